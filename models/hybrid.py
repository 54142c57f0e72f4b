"""Decoders whose layers are recurrent or attend, by their numbers."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import RecurrentShape
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


def recurrent_shape(config: ModelConfig, num_layers: int, num_slots: int, dtype: jnp.dtype) -> RecurrentShape | None:
    """What ``num_layers`` of a model that computes in ``dtype`` keep of ``num_slots`` sequences, in no pages."""
    net = config.recurrent
    if net is None:
        return None
    return RecurrentShape(
        num_layers, num_slots, net.num_key_heads, net.values_per_key, net.key_dim, net.value_dim, net.conv_width, dtype
    )
