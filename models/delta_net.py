"""Layers with the gated delta rule (arXiv 2412.06464), as Qwen3-Next has them among its layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import KVCache, RecurrentState
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.recurrent import RuleRows, convolve, recur
from jaxserve.models.config import ModelConfig, Recurrent
from jaxserve.models.layers import Positions, matrix, parameter
from jaxserve.models.matrix import MatrixLayout
from jaxserve.models.reshape import by_head, convolution
from jaxserve.models.weights import Weight, whole

UNIT_EPS = 1e-6
"""As in the models' own code."""


class GatedDeltaNet(nnx.Module):
    """Key heads with their values, a short convolution, the gated delta rule, a gated norm, and the way out.

    ``mixed`` is one matrix ``[key_heads, channels + gates, hidden]``: of each key head its query, key, values and the
    gates of the values' outputs; ``rates`` has of each value head what b and a of the rule are made of.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.recurrent is not None
        self.net, self.eps = config.recurrent, config.norm_eps
        heads, values, hidden = self.net.num_key_heads, self.net.values_per_key, config.hidden_size
        width, layout = self.net.num_channels + self.net.value_rows, MatrixLayout(num_outputs=2)
        channels = (heads, self.net.num_channels, self.net.conv_width)
        self.mixed = matrix((heads, width, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.rates = matrix((heads, 2 * values, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.kernel = parameter(channels, ("kv_heads", None, None), dtype, rngs)
        self.decay = parameter((heads, values), ("kv_heads", None), dtype, rngs)
        self.decay_bias = parameter((heads, values), ("kv_heads", None), dtype, rngs)
        self.norm = nnx.Param(jnp.ones((self.net.value_dim,), dtype), axes=(None,))
        self.out = matrix((hidden, heads, values, self.net.value_dim), ("embed", "kv_heads", None, None), dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        positions: Positions,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """As Attention's, with the recurrent part of the cache."""
        net, state, segments, mesh = self.net, cache.recurrent, inputs.segments, inputs.mesh
        assert state is not None
        assert segments is not None
        mixed = self.mixed.get_value().multiply(x, rows).reshape(len(x), net.num_key_heads, -1)
        mixed, gates = jnp.split(mixed, (net.num_channels,), axis=-1)
        rates = self.rates.get_value().multiply(x, rows, jnp.dtype("float32"))
        rate, fading = jnp.split(rates.reshape(len(x), net.num_key_heads, -1), 2, axis=-1)
        steps = jax.nn.softplus(fading + self.decay_bias[...].astype(jnp.float32))
        decay = -jnp.exp(self.decay[...].astype(jnp.float32)) * steps

        mixed, last = convolve(mixed, self.kernel[...], state.inputs, segments, layer, mesh=mesh)
        query, key, value = jnp.split(jax.nn.silu(mixed), (net.key_dim, 2 * net.key_dim), axis=-1)
        value = value.reshape(*decay.shape, -1)
        taken = RuleRows(_unit(query) * net.key_dim**-0.5, _unit(key), value, decay, jax.nn.sigmoid(rate))
        read, memory = recur(inputs.backend.recur, taken, state.memory, segments, layer, corrects=True, mesh=mesh)
        y = self._gated_norm(read, gates.reshape(read.shape)).astype(x.dtype)
        cache = cache._replace(recurrent=RecurrentState(last, memory))
        return self.out.get_value().multiply(y.reshape(len(x), -1), rows), cache

    def _gated_norm(self, read: jax.Array, gates: jax.Array) -> jax.Array:
        normed = read * jax.lax.rsqrt(jnp.mean(read * read, axis=-1, keepdims=True) + self.eps)
        return normed * self.norm[...].astype(jnp.float32) * jax.nn.silu(gates.astype(jnp.float32))


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1."""
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + UNIT_EPS)


def _mixed_pieces(net: Recurrent) -> list[tuple[int, int, int]]:
    """Where all queries, then all keys, then all values go; see by_head."""
    keys = net.num_key_heads * net.key_dim
    return [(0, net.key_dim, 0), (keys, net.key_dim, net.key_dim), (2 * keys, net.value_rows, 2 * net.key_dim)]


def delta_net_weights(net: Recurrent, ours: str, theirs: str) -> dict[str, Weight]:
    """Of a GatedDeltaNet at ``ours`` whose projections are tensors of their own, as Qwen3.5's are."""
    heads, theirs = net.num_key_heads, f"{theirs}.linear_attn"
    mixed = by_head(f"{theirs}.in_proj_qkv.weight", heads, _mixed_pieces(net))
    gates = by_head(f"{theirs}.in_proj_z.weight", heads, [(0, net.value_rows, net.num_channels)])
    rate = by_head(f"{theirs}.in_proj_b.weight", heads, [(0, net.values_per_key, 0)])
    decay = by_head(f"{theirs}.in_proj_a.weight", heads, [(0, net.values_per_key, net.values_per_key)])
    return _weights(net, ours, theirs, mixed + gates, rate + decay)


def fused_delta_net_weights(net: Recurrent, ours: str, theirs: str) -> dict[str, Weight]:
    """The same of tensors that are ordered by key head already, as Qwen3-Next's are."""
    heads, theirs = net.num_key_heads, f"{theirs}.linear_attn"
    mixed = by_head(f"{theirs}.in_proj_qkvz.weight", heads, [(0, net.num_channels + net.value_rows, 0)])
    rates = by_head(f"{theirs}.in_proj_ba.weight", heads, [(0, 2 * net.values_per_key, 0)])
    return _weights(net, ours, theirs, mixed, rates)


def _weights(net: Recurrent, ours: str, theirs: str, mixed: Weight, rates: Weight) -> dict[str, Weight]:
    heads = net.num_key_heads
    return {
        f"{ours}.mixed": mixed,
        f"{ours}.rates": rates,
        f"{ours}.kernel": convolution(f"{theirs}.conv1d.weight", heads, _mixed_pieces(net)),
        f"{ours}.decay": by_head(f"{theirs}.A_log", heads, [(0, net.values_per_key, 0)]),
        f"{ours}.decay_bias": by_head(f"{theirs}.dt_bias", heads, [(0, net.values_per_key, 0)]),
        f"{ours}.norm": whole(f"{theirs}.norm.weight"),
        f"{ours}.out": whole(
            f"{theirs}.out_proj.weight",
            lambda tensor: tensor.reshape(-1, heads, net.values_per_key, net.value_dim),
        ),
    }
