"""Paged attention over a hybrid batch: any mix of prefill chunks and decodes in one flat array of rows.

This is the interface that models use. The backends: ``xla`` serves every platform, ``native`` is C++ for CPUs,
``triton`` serves GPUs, ``pod`` is triton with one launch for hybrid batches, and ``mosaic`` is triton with a prefill
kernel for Hopper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxserve.kernels import cpu_attention, xla
from jaxserve.kernels.backend import GPU_BACKENDS, Backend
from jaxserve.kernels.plan import AttentionPlan

Rotation = tuple[jax.Array, jax.Array] | None
"""cos and sin ``float32[T, rotated dims / 2]`` of the rows' positions; None for models without rotary embeddings."""


class KVCache[Array](NamedTuple):
    """Keys and values of all layers, ``[layers * pages, page_size, kv_heads, head_dim]`` each.

    Page ``p`` of layer ``l`` is row ``l * pages + p``, so a layer is an offset and no slice is ever copied. Page 0 of
    each layer is the dummy page that padding rows write to.
    """

    k: Array
    v: Array
    scales: Array
    """``float32[layers, 2]``: what a layer's stored keys and values stand for is so many times as large. For caches of
    float8_e4m3fn; of others it is not read."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs to know of a step, shared by all layers."""

    slots: jax.Array
    """``int32[T]``: where a row's key and value go, page * page_size + offset."""
    block_tables: jax.Array
    """``int32[max_num_seqs, pages of max_model_len]``: the pages of each sequence, 0 where it has none."""
    plan: AttentionPlan[jax.Array]
    """Cut as the backend's tiling says."""
    num_pages: int = field(metadata={"static": True})
    """Pages of one layer."""
    backend: Backend = field(default=Backend("xla"), metadata={"static": True})
    mesh: Mesh | AbstractMesh | None = field(default=None, metadata={"static": True})
    """Its axis ``tensor`` divides the heads; None: there is one device."""


REPLICATED = PartitionSpec()
HEADS = PartitionSpec(None, "tensor")
CACHE = KVCache(k=PartitionSpec(None, None, "tensor"), v=PartitionSpec(None, None, "tensor"), scales=REPLICATED)
"""How arrays lie on a mesh: KV heads are divided, and query heads with them."""


def _per_shard[**P, R](
    function: Callable[P, R], mesh: Mesh | AbstractMesh | None, in_specs: object, out_specs: object
) -> Callable[P, R]:
    """Kernels see one device's heads; the partitioner cannot look into them."""
    if mesh is None or mesh.shape["tensor"] == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rotate_and_write(
    qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
) -> tuple[jax.Array, KVCache[jax.Array]]:
    """Rotate the rows' queries and keys, and store keys and values in layer number ``layer``, a scalar.

    qkv: ``[T, kv_heads, group + 2, head_dim]``, for each KV head its query heads, its key and its value. Returns the
    queries ``[T, heads, head_dim]`` and the cache.
    """
    specs = HEADS, REPLICATED, CACHE, REPLICATED, REPLICATED
    write = _per_shard(_rotate_and_write, inputs.mesh, specs, (HEADS, CACHE))
    return write(qkv, rotation, cache, inputs, layer)


def _rotate_and_write(
    qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
) -> tuple[jax.Array, KVCache[jax.Array]]:
    if inputs.backend.name in GPU_BACKENDS:
        from jaxserve.kernels import triton_attention  # it needs packages that only GPUs do

        return triton_attention.rotate_and_write(qkv, rotation, cache, inputs, layer)
    layer_page = layer * inputs.num_pages
    if inputs.backend.name == "native":
        q, k, v = cpu_attention.rotate_and_write(qkv, rotation, cache.k, cache.v, inputs.slots, layer_page)
    else:
        slots = inputs.slots + layer_page * cache.k.shape[1]
        q, k, v = xla.rotate_and_write(qkv, rotation, cache.k, cache.v, slots, cache.scales[layer])
    return q, cache._replace(k=k, v=v)


def paged_attention(
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Causal attention of every row over its own sequence's cached keys, its own included.

    q: ``[T, heads, head_dim]``, already rotated; returns the same shape and type. Rows of no sequence return zeros.
    window: a query at position i sees the keys at i - window < j <= i, as in transformers; layers may differ, none may
    exceed the plan's PlanLimits.window.
    softcap: scaled scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2 (arXiv 2408.00118).
    """
    attend = partial(_paged_attention, scale=scale, window=window, softcap=softcap)
    return _per_shard(attend, inputs.mesh, (HEADS, CACHE, REPLICATED, REPLICATED), HEADS)(q, cache, inputs, layer)


def _paged_attention(
    q: jax.Array, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array, **masking: Any
) -> jax.Array:
    if inputs.backend.name in GPU_BACKENDS:
        from jaxserve.kernels import triton_attention

        return triton_attention.paged_attention(q, cache, inputs, layer, **masking)
    layer_page = layer * inputs.num_pages
    if inputs.backend.name == "native":
        return cpu_attention.paged_attention(
            q, cache.k, cache.v, inputs.block_tables, layer_page, inputs.plan, **masking
        )
    tables = inputs.block_tables + layer_page
    return xla.paged_attention(
        q, cache.k, cache.v, tables, cache.scales[layer], inputs.plan, tiling=inputs.backend.tiling, **masking
    )
