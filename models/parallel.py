"""Decoders whose attention and MLP run side by side."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_mlp
from jaxserve.models.layers import Attention, Positions
from jaxserve.models.norms import make_norm


class ParallelLayer(nnx.Module):
    """``x += attention(norm(x)) + mlp(norm(x))``, with one norm for both or one each."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, dtype)
        self.attention = Attention(config, layer, dtype, rngs)
        self.mlp_norm = make_norm(config, dtype) if config.num_parallel_norms == 2 else None
        self.mlp = make_mlp(config, layer, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        positions: Positions,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        normed = self.attention_norm(x)
        attended, cache = self.attention(normed, rows, positions, cache, inputs, layer)
        # Added up first: under tensor parallelism both are partial sums, which one all-reduce then completes.
        return x + (attended + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x), rows)), cache


class ParallelDecoder(Decoder):
    layer_class: ClassVar[type[nnx.Module]] = ParallelLayer
