"""The Triton kernels of paged attention in jax programs.

Three launches attend: ``attend`` prefill items, ``attend`` decode items, and ``combine``. The first two do not depend
on each other, so that they can run at once. Each has as many programs as the device runs at once, which loop over what
there is. Everything that varies from step to step or layer to layer reaches them in device memory, so that no small XLA
operation stands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import triton
from triton.backends.nvidia import driver as nvidia_driver

from jaxserve.kernels import triton_kernels, triton_pod, triton_rotate
from jaxserve.kernels.cache import KVCache, is_quantised
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.reach import Reach

if not hasattr(nvidia_driver, "TMA_TF32"):
    # jax-triton 0.4 imports this constant, which Triton before 3.7 lacks, for TMA descriptors, which are not used here.
    nvidia_driver.TMA_TF32 = 12
from jax_triton import triton_call

DECODE, PREFILL = 0, 1
"""Kinds of work items: where ``AttentionPlan.counts`` has their number."""
SMALLEST_BLOCK = 16
"""Rows and columns of the smallest product that Triton makes."""
KV_TILE_TOKENS = 64
"""Keys of one step: with 128 the scores of a prefill tile do not fit into registers beside its accumulators."""
WARPGROUP_ROWS = 64
"""Rows of a Hopper matrix product, which four warps make together."""
WARPGROUP_ACCUMULATORS = 64 * 128
"""Numbers that the registers of four warps have room for."""
DECODE_STAGES = 5
"""Finding a page before loading it takes two of them: five are needed to load one tile ahead."""
PREFILL_STAGES = 3
POD_PROGRAMS_PER_CORE, POD_WARPS = 2, 8
COMBINE_PROGRAMS_PER_CORE = 4
COMBINE_SHARES = 16
"""Programs that share the results of one entry: enough to spread a single long decode, or a tile's many rows."""
CORE_REGISTERS = 65536
"""Of a multiprocessor."""
REGISTERS = {DECODE: 144, PREFILL: 184}
"""Of a thread: a program of prefill with eight warps and one of decode with four share a multiprocessor's."""
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
        kernel=triton_rotate.rotate_and_write,
        out_type=(_struct((rows, kv_heads * (width - 2), dim), qkv.dtype), *map(_like, cache.pages)),
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
        LAYER_SLOTS=inputs.limits.num_pages * cache.k.shape[1],
        QUANTISED=is_quantised(cache.k.dtype),
        BLOCK_ROWS=ROTATE_ROWS,
        BLOCK_DIM=_block(dim),
    )  # fmt: skip
    return q, cache._replace(k=k, v=v)


def attend(
    kind: int,
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    sinks: jax.Array | None,
    **masking: Any,
) -> Sequence[jax.Array]:
    """Work through the items of one kind, DECODE or PREFILL, of a plan whose tiling has ``busy``: partial results, and
    before these prefill's output.

    sinks, masking: as of kernels.attention.paged_attention; only what writes the output has sinks. Partial results are
    unnormalised values ``float32[n, heads, head_dim]`` and stats ``float32[n, heads, 2]``.
    """
    plan, limits, target = inputs.plan, inputs.limits, inputs.backend.target
    busy, decoding = limits.tiling.busy, kind == DECODE
    assert busy is not None
    num_partials = limits.max_decode_items if decoding else limits.max_prefill_partials
    partial = tuple(_struct((num_partials, q.shape[1], size), jnp.float32) for size in (q.shape[2], 2))
    programs = busy.decode if decoding else busy.prefill
    constants = _constants(q, cache, inputs, **masking)
    block_rows = _block_rows(kind, q, cache, inputs)
    num_warps = _num_warps(block_rows, constants["BLOCK_DIM"])
    limit = REGISTERS[kind] if constants["BLOCK_DIM"] <= 128 and num_warps == (4 if decoding else 8) else None
    if not decoding and programs > target.num_cores:
        limit = _share_of_registers(programs // target.num_cores, num_warps)
    return triton_call(
        q, cache.k, cache.v, inputs.block_tables, plan.decode if decoding else plan.prefill, plan.counts, layer,
        cache.scales, sinks, *((None,) if decoding else ()),
        kernel=triton_kernels.attend,
        out_type=partial if decoding else (_like(q), *partial),
        input_output_aliases={},
        grid=(programs,),
        name="decode" if decoding else "prefill",
        num_warps=num_warps,
        compute_capability=target.compute_capability,
        backend_options=COMPILER_OPTIONS | {"maxnreg": limit},
        KIND=kind,
        PROGRAMS=programs,
        # Starting a second loop empties the pipeline of loads, which only pays where masking is work.
        UNMASKED=not decoding,
        BLOCK_ROWS=block_rows,
        STAGES=DECODE_STAGES if decoding else PREFILL_STAGES,
        **constants,
    )  # fmt: skip


def attend_both(
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    sinks: jax.Array | None,
    out: jax.Array,
    prefill: Sequence[jax.Array],
    decode: Sequence[jax.Array],
    **masking: Any,
) -> tuple[jax.Array, Sequence[jax.Array], Sequence[jax.Array]]:
    """Work through the items of hybrid batches, of which ``attend`` finds none, and add to its results."""
    plan, target = inputs.plan, inputs.backend.target
    operands = (
        q, cache.k, cache.v, inputs.block_tables, plan.decode, plan.prefill, plan.counts, layer, cache.scales,
    )  # fmt: skip
    changed = jnp.zeros(2 + target.num_cores, jnp.int32), out, *prefill, *decode
    _, out, *partial = triton_call(
        *operands, *changed, sinks,
        kernel=triton_pod.attend_both,
        out_type=tuple(map(_like, changed)),
        input_output_aliases={len(operands) + i: i for i in range(len(changed))},
        grid=(POD_PROGRAMS_PER_CORE * target.num_cores,),
        num_warps=POD_WARPS,
        compute_capability=target.compute_capability,
        backend_options=COMPILER_OPTIONS | {"maxnreg": _share_of_registers(POD_PROGRAMS_PER_CORE, POD_WARPS)},
        CORES=target.num_cores,
        DECODE_ROWS=_block_rows(DECODE, q, cache, inputs),
        PREFILL_ROWS=_block_rows(PREFILL, q, cache, inputs),
        DECODE_STAGES=DECODE_STAGES,
        PREFILL_STAGES=PREFILL_STAGES,
        **_constants(q, cache, inputs, **masking),
    )  # fmt: skip
    return out, partial[:2], partial[2:]


def _constants(
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    *,
    scale: float,
    reach: Reach,
    softcap: float | None,
) -> dict[str, Any]:
    """What kernels that attend know of a model when they are compiled."""
    page_size, kv_heads = cache.k.shape[1:3]
    heads, dim = q.shape[1:]
    return {
        "SCALE": scale, "WINDOW": reach.window, "CHUNK": reach.chunk, "SOFTCAP": softcap,
        "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "HEAD_DIM": dim, "BLOCK_DIM": _block(dim),
        "PAGE_SIZE": page_size, "NUM_PAGES": inputs.limits.num_pages, "TABLE_WIDTH": inputs.block_tables.shape[1],
        "QUANTISED": is_quantised(cache.k.dtype), "TILE": KV_TILE_TOKENS,
    }  # fmt: skip


def _block_rows(kind: int, q: jax.Array, cache: KVCache[jax.Array], inputs: AttentionInputs) -> int:
    """Rows of a tile: queries times the heads that share a KV head."""
    queries = 1 if kind == DECODE else inputs.limits.tile_rows
    return _block(queries * (q.shape[1] // cache.k.shape[2]))


def combine(
    out: jax.Array,
    prefill: Sequence[jax.Array],
    decode: Sequence[jax.Array],
    inputs: AttentionInputs,
    sinks: jax.Array | None,
) -> jax.Array:
    """Put partial results, and the sinks, together: the output with the rows that have such."""
    _, heads, dim = out.shape
    target = inputs.backend.target
    programs = COMBINE_PROGRAMS_PER_CORE * target.num_cores
    return triton_call(
        *decode, *prefill, inputs.plan.combine, inputs.plan.counts, out, sinks,
        kernel=triton_kernels.combine,
        out_type=_like(out),
        input_output_aliases={6: 0},
        grid=(programs,),
        num_warps=4,
        compute_capability=target.compute_capability,
        backend_options=COMPILER_OPTIONS,
        PROGRAMS=programs,
        SHARES=COMBINE_SHARES,
        PREFILL_PARTIAL=len(decode[0]),
        HEADS=heads,
        HEAD_DIM=dim,
        BLOCK_DIM=_block(dim),
    )  # fmt: skip


def _share_of_registers(programs: int, num_warps: int) -> int:
    """Of a thread, where ``programs`` are to run on a multiprocessor at once."""
    return CORE_REGISTERS // (programs * num_warps * 32)


def _num_warps(block_rows: int, block_dim: int) -> int:
    return 8 if block_rows > WARPGROUP_ROWS or block_rows * block_dim > WARPGROUP_ACCUMULATORS else 4


def _block(size: int) -> int:
    return max(SMALLEST_BLOCK, triton.next_power_of_2(size))


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return _struct(array.shape, array.dtype)
