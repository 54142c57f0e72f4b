"""Paged attention on GPUs: the kernels of kernels/triton_kernels.py in jax programs.

Three launches attend: prefill items, decode items, and what puts split tiles together. Everything that varies from step
to step or layer to layer reaches them in device memory, so that no small XLA operation stands between them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import triton
from triton.backends.nvidia import driver as nvidia_driver

from jaxserve.kernels import triton_kernels
from jaxserve.kernels.attention import AttentionInputs, KVCache, Rotation
from jaxserve.kernels.plan import PlanLimits

if not hasattr(nvidia_driver, "TMA_TF32"):
    # jax-triton 0.4 imports this constant, which Triton before 3.7 lacks, for TMA descriptors, which are not used here.
    nvidia_driver.TMA_TF32 = 12
from jax_triton import triton_call

Partial = tuple[jax.Array, jax.Array, jax.Array]
"""Output ``[T, heads, head_dim]``, and partial results: values ``float32[max_partial_rows, heads, head_dim]``, and
stats ``float32[max_partial_rows, heads, 2]``, the maximum of the scores in base 2 and the sum of the weights."""

DECODE, PREFILL = 0, 1
"""Kinds of work items: where ``AttentionPlan.counts`` has their number."""
SMALLEST_BLOCK = 16
"""Rows and columns of the smallest product that Triton makes."""
KV_TILE_TOKENS = 64
"""Keys of one step: with 128 the scores of a prefill tile do not fit into registers beside its accumulators."""
WARPGROUP_ROWS = 64
"""Rows of a Hopper matrix product, which four warps make together."""
DECODE_STAGES = 5
"""Finding a page before loading it takes two of them: five are needed to load one tile ahead."""
PREFILL_STAGES = 3
COMBINE_PARTS = 32
"""Partial results that are loaded at a time."""
COMBINE_PROGRAMS = 4
"""Programs that share the rows of one split tile."""
ROTATE_ROWS = 16
"""Rows of one program: enough to fill four warps with 16-byte loads, few enough to spread a small batch."""
COMPILER_OPTIONS = {"enable_fp_fusion": True, "ptx_version": 86}
"""Triton 3.10 no longer fuses by default. PTX 8.6 is what the assembler of any CUDA 12.7 or newer reads, which may be
older than Triton's own."""


def rotate_and_write(
    qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
) -> tuple[jax.Array, KVCache[jax.Array]]:
    """See kernels.attention.rotate_and_write; one kernel, which writes the cache in place."""
    rows, kv_heads, width, dim = qkv.shape
    q, k, v = triton_call(
        qkv, inputs.slots, layer, cache.scales, cache.k, cache.v, *(rotation or (None, None)),
        kernel=triton_kernels.rotate_and_write,
        out_type=(_struct((rows, kv_heads * (width - 2), dim), qkv.dtype), *map(_like, cache[:2])),
        input_output_aliases={4: 1, 5: 2},
        grid=(kv_heads * width, -(-rows // ROTATE_ROWS)),
        num_warps=4,
        compute_capability=inputs.backend.target.compute_capability,
        backend_options=COMPILER_OPTIONS,
        NUM_ROWS=rows,
        KV_HEADS=kv_heads,
        GROUP=width - 2,
        HEAD_DIM=dim,
        HALF=0 if rotation is None else rotation[0].shape[-1],
        LAYER_SLOTS=inputs.num_pages * cache.k.shape[1],
        QUANTISED=_quantised(cache),
        BLOCK_ROWS=ROTATE_ROWS,
        BLOCK_DIM=_block(dim),
    )  # fmt: skip
    return q, cache._replace(k=k, v=v)


def paged_attention(
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """See kernels.attention.paged_attention; for plans whose tiling has ``busy``, which write every row."""
    masking: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if inputs.backend.name == "mosaic":
        from jaxserve.kernels import mosaic_attention  # it needs packages that only Hopper GPUs do

        partial = mosaic_attention.paged_prefill(q, cache, inputs, layer, **masking)
    else:
        partial = _attend(PREFILL, q, cache, inputs, layer, None, **masking)
    out, values, stats = _attend(DECODE, q, cache, inputs, layer, partial, **masking)
    return _combine(out, values, stats, inputs)


def partial_structs(q: jax.Array, cache: KVCache[jax.Array], inputs: AttentionInputs) -> tuple[Any, Any, Any]:
    """Shapes and types of Partial."""
    rows, heads, dim = q.shape
    sequences, pages = inputs.block_tables.shape
    page_size = cache.k.shape[1]
    limits = PlanLimits(rows, sequences, pages * page_size, page_size, inputs.num_pages, inputs.backend.tiling)
    partial = (limits.max_partial_rows, heads)
    return _like(q), _struct((*partial, dim), jnp.float32), _struct((*partial, 2), jnp.float32)


def _attend(
    kind: int,
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    partial: Partial | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Partial:
    """Work through the items of one kind; what they do not write is as in ``partial``, if that is given."""
    plan, (rows, heads, dim) = inputs.plan, q.shape
    page_size, kv_heads = cache.k.shape[1:3]
    group = heads // kv_heads
    items = plan.decode if kind == DECODE else plan.prefill
    block_rows = _block(group * (1 if kind == DECODE else inputs.backend.tiling.tile_rows(rows)))
    operands = (q, cache.k, cache.v, inputs.block_tables, items, plan.counts, layer, cache.scales)
    return triton_call(
        *operands, *(partial or ()),
        kernel=triton_kernels.attend,
        out_type=partial_structs(q, cache, inputs),
        input_output_aliases={len(operands) + i: i for i in range(len(partial or ()))},
        grid=(kv_heads, len(items)),
        name="decode" if kind == DECODE else "prefill",
        num_warps=8 if block_rows > WARPGROUP_ROWS else 4,
        num_stages=DECODE_STAGES if kind == DECODE else PREFILL_STAGES,
        compute_capability=inputs.backend.target.compute_capability,
        backend_options=COMPILER_OPTIONS,
        KIND=kind,
        SCALE=scale,
        WINDOW=window,
        SOFTCAP=softcap,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=dim,
        PAGE_SIZE=page_size,
        NUM_PAGES=inputs.num_pages,
        TABLE_WIDTH=inputs.block_tables.shape[1],
        QUANTISED=_quantised(cache),
        # Starting a second loop empties the pipeline of loads, which only pays where masking is work.
        UNMASKED=kind == PREFILL and window is None,
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=_block(dim),
        TILE=KV_TILE_TOKENS,
    )  # fmt: skip


def _combine(out: jax.Array, values: jax.Array, stats: jax.Array, inputs: AttentionInputs) -> jax.Array:
    _, heads, dim = out.shape
    entries = inputs.plan.combine
    return triton_call(
        values, stats, entries, inputs.plan.counts, out,
        kernel=triton_kernels.combine,
        out_type=_like(out),
        input_output_aliases={4: 0},
        grid=(heads, COMBINE_PROGRAMS, len(entries)),
        num_warps=4,
        compute_capability=inputs.backend.target.compute_capability,
        backend_options=COMPILER_OPTIONS,
        HEADS=heads,
        HEAD_DIM=dim,
        PROGRAMS=COMBINE_PROGRAMS,
        PARTS=COMBINE_PARTS,
        BLOCK_DIM=_block(dim),
    )  # fmt: skip


def _block(size: int) -> int:
    return max(SMALLEST_BLOCK, triton.next_power_of_2(size))


def _quantised(cache: KVCache[jax.Array]) -> bool:
    return cache.k.dtype.itemsize == 1


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return _struct(array.shape, array.dtype)
