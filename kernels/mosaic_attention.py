"""Paged attention on Hopper GPUs: chunks in Pallas Mosaic GPU, see mosaic_prefill.py, and decodes in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.triton_attention import Triton


@dataclass(frozen=True)
class Mosaic(Triton):
    """As Triton, but for prefill items."""

    name = "mosaic"
    own_kernels = frozenset(("chunks", "hybrid"))

    @staticmethod
    def needs(target: Target, shape: AttentionShape) -> str | None:
        if needed := Triton.needs(target, shape):
            return needed
        if target.compute_capability // 10 != 9:
            return f"a Hopper GPU (compute capability 9.0), got {target.compute_capability / 10}"
        if shape.num_heads > 16 * shape.num_kv_heads:
            return f"at most 16 query heads for each KV head, got {shape.num_heads // shape.num_kv_heads}"
        if shape.page_size != 64 or shape.head_dim not in (64, 128):
            return f"block_size 64 and head_dim 64 or 128, got {shape.page_size} and {shape.head_dim}"
        if shape.cache_dtype != shape.dtype or shape.dtype not in (jnp.bfloat16, jnp.float16):
            dtypes = f"{shape.dtype.name} and {shape.cache_dtype.name}"
            return f"bfloat16 or float16 with a KV cache of the same, got {dtypes}"
        return None

    def _prefill(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        **masking: Any,
    ) -> Sequence[jax.Array]:
        from jaxserve.kernels import mosaic_prefill  # it needs packages that only Hopper GPUs do

        return mosaic_prefill.paged_prefill(q, cache, inputs, layer, sinks, **masking)
