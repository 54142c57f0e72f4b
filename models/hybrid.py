"""Decoders whose layers are recurrent or attend, by their numbers."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, DecoderLayer
from jaxserve.models.delta_net import GatedDeltaNet
from jaxserve.models.mamba import Mamba2

MIXERS: dict[str, type[GatedDeltaNet | Mamba2]] = {"delta_net": GatedDeltaNet, "mamba2": Mamba2}
"""Kinds of recurrent layers."""


class HybridLayer(DecoderLayer):
    """Either kind."""

    def make_attention(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        if config.recurrent is not None and config.is_recurrent(layer):
            return MIXERS[config.recurrent.kind](config, dtype, rngs)
        return super().make_attention(config, layer, dtype, rngs)


class HybridDecoder(Decoder):
    """Layers of both kinds."""

    layer_class = HybridLayer
