"""Paged attention over a hybrid batch: any mix of prefill chunks and decodes in one flat array of rows.

This is the interface that models use. ``xla`` serves every platform; ``native`` is C++ for CPUs. GPU kernels will be
chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import cpu, xla
from jaxserve.kernels.plan import AttentionPlan


class KVCache[Array](NamedTuple):
    """Keys and values of all layers, ``[layers * pages, page_size, kv_heads, head_dim]`` each.

    Page ``p`` of layer ``l`` is row ``l * pages + p``, so a layer is an offset and no slice is ever copied. Page 0 of
    each layer is the dummy page that padding rows write to.
    """

    k: Array
    v: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs to know of a step, shared by all layers."""

    slots: jax.Array
    """``int32[T]``: where a row's key and value go, page * page_size + offset."""
    block_tables: jax.Array
    """``int32[max_num_seqs, pages of max_model_len]``: the pages of each sequence, 0 where it has none."""
    plan: AttentionPlan[jax.Array]
    num_pages: int = field(metadata={"static": True})
    """Pages of one layer."""
    backend: str = field(default="xla", metadata={"static": True})
    """``xla`` or ``native``."""


def choose_backend(name: str, platform: str, dtype: jnp.dtype) -> str:
    """The backend to use for ``name``, one of config.ATTENTION_BACKENDS; ValueError where a named one cannot serve."""
    native = platform == "cpu" and dtype == jnp.float32
    if name == "native" and not (native and cpu.available()):
        raise ValueError(
            f"attention_backend native needs a CPU, float32 and a C++ compiler, got {platform} and {dtype.name}"
        )
    if name == "auto":
        return "native" if native and cpu.available() else "xla"
    return name


def write_kv(
    cache: KVCache[jax.Array], k: jax.Array, v: jax.Array, inputs: AttentionInputs, layer: jax.Array
) -> KVCache[jax.Array]:
    """Store the rows' keys and values ``[T, kv_heads, head_dim]`` in layer number ``layer``, a scalar."""
    page_size = cache.k.shape[1]
    slots = inputs.slots + layer * inputs.num_pages * page_size
    return KVCache(xla.write_rows(cache.k, k, slots), xla.write_rows(cache.v, v, slots))


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
    tables = inputs.block_tables + layer * inputs.num_pages
    attend = cpu.paged_attention if inputs.backend == "native" else xla.paged_attention
    return attend(q, cache.k, cache.v, tables, inputs.plan, scale=scale, window=window, softcap=softcap)
