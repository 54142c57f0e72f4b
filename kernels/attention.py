"""Paged attention over a hybrid batch: any mix of prefill chunks and decodes in one flat array of rows.

This is the interface that models use; the backend that a step's inputs name computes it, on each device's own heads.
"""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import PartitionSpec

from jaxserve.kernels.cache import KVCache, cache_specs
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.reach import Reach
from jaxserve.kernels.shards import per_shard

REPLICATED = PartitionSpec()
HEADS = PartitionSpec(None, "tensor")
SINKS = PartitionSpec("tensor")
CACHE = cache_specs(tensor="tensor")
"""How arrays lie on a mesh: KV heads are divided, and query heads with them."""


def rotate_and_write(
    qkv: jax.Array,
    rotation: Rotation,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    *,
    local: bool = False,
) -> tuple[jax.Array, KVCache[jax.Array]]:
    """Rotate the rows' queries and keys, and store keys and values in layer number ``layer``, a scalar.

    qkv: ``[T, kv_heads, group + 2, head_dim]``, for each KV head its query heads, its key and its value; ``group + 1``
    where a key is its own value. Returns the queries ``[T, heads, head_dim]`` and the cache.
    local: of which part of the cache ``layer`` is.
    """
    specs = HEADS, REPLICATED, CACHE, REPLICATED, REPLICATED
    write = per_shard(inputs.backend.rotate_and_write, inputs.mesh, specs, (HEADS, CACHE))
    q, written = write(qkv, rotation, cache.part(local), inputs, layer)
    return q, cache.with_part(local, written)


def paged_attention(
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    *,
    local: bool = False,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of every row over its own sequence's cached keys, its own included.

    q: ``[T, heads, head_dim]``, already rotated; returns the same shape and type. Rows of no sequence return zeros.
    local: of which part of the cache ``layer`` is.
    window: a query at position i sees the keys at i - window < j <= i, as in transformers; layers may differ, none may
    exceed the plan's PlanLimits.window.
    chunk: a query at position i sees the keys from i // chunk * chunk on, as in Llama 4; a layer has this or a window.
    softcap: scaled scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2 (arXiv 2408.00118).
    sinks: ``float32[heads]``: the score of a key that every query of the head sees and whose value is 0, as in gpt-oss
    (arXiv 2508.10925).
    """
    attend = partial(inputs.backend.attend, scale=scale, reach=Reach(window, chunk), softcap=softcap)
    specs = HEADS, CACHE, REPLICATED, REPLICATED, SINKS
    return per_shard(attend, inputs.mesh, specs, HEADS)(q, cache.part(local), inputs, layer, sinks)
