"""Layers with the gated delta rule (arXiv 2412.06464) instead of attention, as Qwen3-Next has them among its layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.kernels.cache import KVCache, RecurrentShape
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.recurrent import gated_delta_rule
from jaxserve.models.config import DeltaNet, ModelConfig
from jaxserve.models.decoder import Decoder, DecoderLayer
from jaxserve.models.layers import matrix, parameter
from jaxserve.models.matrix import MatrixLayout
from jaxserve.models.weights import Part, Weight, whole


class GatedDeltaNet(nnx.Module):
    """Key heads with their values, a short convolution, the gated delta rule, a gated norm, and the way out.

    ``mixed`` is one matrix ``[key_heads, channels + gates, hidden]``: of each key head its query, key, values and the
    gates of the values' outputs; ``rates`` has of each value head what b and a of the rule are made of.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.delta_net is not None
        self.net, self.eps = config.delta_net, config.norm_eps
        heads, values, hidden = self.net.num_key_heads, self.net.values_per_key, config.hidden_size
        self.num_channels = num_channels(self.net)
        width, layout = self.num_channels + values * self.net.value_dim, MatrixLayout(num_outputs=2)
        self.mixed = matrix((heads, width, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.rates = matrix((heads, 2 * values, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.kernel = parameter((heads, self.num_channels, self.net.conv_width), ("kv_heads", None, None), dtype, rngs)
        self.decay = parameter((heads, values), ("kv_heads", None), dtype, rngs)
        self.decay_bias = parameter((heads, values), ("kv_heads", None), dtype, rngs)
        self.norm = nnx.Param(jnp.ones((self.net.value_dim,), dtype), axes=(None,))
        self.out = matrix((hidden, heads, values, self.net.value_dim), ("embed", "kv_heads", None, None), dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        rope: Rotation,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """As Attention's, with the recurrent part of the cache."""
        heads = self.net.num_key_heads
        mixed = self.mixed.get_value().multiply(x, rows).reshape(len(x), heads, -1)
        mixed, gates = jnp.split(mixed, (self.num_channels,), axis=-1)
        rates = self.rates.get_value().multiply(x, rows, jnp.dtype("float32"))
        rate, fading = jnp.split(rates.reshape(len(x), heads, -1), 2, axis=-1)
        steps = jax.nn.softplus(fading + self.decay_bias[...].astype(jnp.float32))
        decay = -jnp.exp(self.decay[...].astype(jnp.float32)) * steps
        assert cache.recurrent is not None
        assert inputs.segments is not None
        read, recurrent = gated_delta_rule(
            mixed, decay, jax.nn.sigmoid(rate), self.kernel[...], cache.recurrent, inputs.segments, layer,
            run=inputs.backend.run_delta_rule, mesh=inputs.mesh,
        )  # fmt: skip
        y = self._gated_norm(read, gates.reshape(read.shape)).astype(x.dtype)
        return self.out.get_value().multiply(y.reshape(len(x), -1), rows), cache._replace(recurrent=recurrent)

    def _gated_norm(self, read: jax.Array, gates: jax.Array) -> jax.Array:
        normed = read * jax.lax.rsqrt(jnp.mean(read * read, axis=-1, keepdims=True) + self.eps)
        return normed * self.norm[...].astype(jnp.float32) * jax.nn.silu(gates.astype(jnp.float32))


class HybridLayer(DecoderLayer):
    """With attention or the gated delta rule, by its number."""

    def make_attention(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        if config.is_recurrent(layer):
            return GatedDeltaNet(config, dtype, rngs)
        return super().make_attention(config, layer, dtype, rngs)


class HybridDecoder(Decoder):
    """Layers of both kinds."""

    layer_class = HybridLayer


def num_channels(net: DeltaNet) -> int:
    """Of a key head, what goes through the convolution: query, key and values."""
    return 2 * net.key_dim + net.values_per_key * net.value_dim


def recurrent_shape(config: ModelConfig, num_layers: int, num_slots: int, dtype: jnp.dtype) -> RecurrentShape | None:
    """What ``num_layers`` of a model that computes in ``dtype`` keep of ``num_slots`` sequences, in no pages."""
    net = config.delta_net
    if net is None:
        return None
    return RecurrentShape(
        num_layers, num_slots, net.num_key_heads, net.values_per_key, net.key_dim, net.value_dim, net.conv_width, dtype
    )


View = Callable[[np.ndarray], np.ndarray]


def _by_key_head(net: DeltaNet, rows: slice, each: int, tensor: np.ndarray) -> np.ndarray:
    """Some rows of a tensor, ``each`` of them to a key head."""
    return tensor[rows].reshape(net.num_key_heads, each, *tensor.shape[1:])


def separate_rows(net: DeltaNet, tensor: str, start: int = 0) -> tuple[Part, ...]:
    """Query, key and values of each key head, from a tensor of all queries, then all keys, then all values."""
    keys, values = net.num_key_heads * net.key_dim, net.num_value_heads * net.value_dim
    value_rows = net.values_per_key * net.value_dim
    bounds = ((0, keys, net.key_dim), (keys, 2 * keys, net.key_dim), (2 * keys, 2 * keys + values, value_rows))
    parts, place = [], start
    for begin, end, each in bounds:
        parts.append(Part(tensor, partial(_by_key_head, net, slice(begin, end), each), (0, place)))
        place += each
    return tuple(parts)


def delta_net_weights(config: ModelConfig, ours: str, theirs: str, mixed: Weight, rates: Weight) -> dict[str, Weight]:
    """Of a GatedDeltaNet at ``ours``; families differ in how they store ``mixed`` and ``rates``."""
    net = config.delta_net
    assert net is not None
    theirs += ".linear_attn"
    convolved = [
        Part(part.name, partial(_without_group, part.view), part.start)
        for part in separate_rows(net, f"{theirs}.conv1d.weight")
    ]
    by_head: View = lambda tensor: tensor.reshape(net.num_key_heads, -1)  # noqa: E731
    return {
        f"{ours}.mixed": mixed,
        f"{ours}.rates": rates,
        f"{ours}.kernel": tuple(convolved),
        f"{ours}.decay": whole(f"{theirs}.A_log", by_head),
        f"{ours}.decay_bias": whole(f"{theirs}.dt_bias", by_head),
        f"{ours}.norm": whole(f"{theirs}.norm.weight"),
        f"{ours}.out": whole(
            f"{theirs}.out_proj.weight",
            lambda tensor: tensor.reshape(-1, net.num_key_heads, net.values_per_key, net.value_dim),
        ),
    }


def _without_group(view: View, tensor: np.ndarray) -> np.ndarray:
    """Of a grouped convolution, whose filters see one channel each: ``[channels, 1, width]``."""
    return view(tensor[:, 0])
