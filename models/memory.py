"""What a model's layers keep of sequences, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax.numpy as jnp

from jaxserve.kernels.cache import KVCacheShape, RecurrentShape
from jaxserve.models.config import Memory, ModelConfig


def cache_shape(
    config: ModelConfig,
    kept: Mapping[Memory, Sequence[int]],
    *,
    page_size: int,
    num_slots: int,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
) -> KVCacheShape:
    """Of the layers ``kept``, as config.by_memory gives them, of a model that computes in ``dtype``.

    num_slots: of how many sequences there are states, in no pages.
    """
    full, local = (
        KVCacheShape(
            len(kept[memory]), kind.num_held_kv_heads, kind.head_dim, page_size, cache_dtype, has_values=kind.has_values
        )
        for memory, kind in ((Memory.PAGES, config), (Memory.LOCAL_PAGES, config.of_kind(local=True)))
    )
    states = _recurrent_shape(config, len(kept[Memory.STATE]), num_slots, dtype)
    return replace(full, recurrent=states, local=local if local.num_layers else None)


def _recurrent_shape(config: ModelConfig, num_layers: int, num_slots: int, dtype: jnp.dtype) -> RecurrentShape | None:
    net = config.recurrent
    if net is None:
        return None
    return RecurrentShape(
        num_layers, num_slots, net.num_key_heads, net.values_per_key, net.key_dim, net.value_dim, net.conv_width, dtype
    )
