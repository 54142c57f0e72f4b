"""Layers with the gated delta rule (arXiv 2412.06464), as Qwen3-Next has them among its layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.recurrent import RuleRows
from jaxserve.models.config import ModelConfig, Recurrent
from jaxserve.models.norms import root_mean_square
from jaxserve.models.recurrent import RecurrentMixer
from jaxserve.models.reshape import by_head, convolution
from jaxserve.models.weights import Weight, whole

UNIT_EPS = 1e-6
"""As in the models' own code."""


class GatedDeltaNet(RecurrentMixer):
    """Keys of length 1; a value head's rate and decay are made of one number each; its gate comes after its norm."""

    corrects = True

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.recurrent is not None
        super().__init__(config, 2 * config.recurrent.values_per_key, dtype, rngs)
        self.norm = nnx.Param(jnp.ones((self.net.value_dim,), dtype), axes=(None,))

    def rule_rows(self, query: jax.Array, key: jax.Array, value: jax.Array, rates: jax.Array) -> RuleRows:
        rate, fading = jnp.split(rates, 2, axis=-1)
        decay = self.decays(self.steps(fading))
        return RuleRows(_unit(query) * self.net.key_dim**-0.5, _unit(key), value, decay, jax.nn.sigmoid(rate))

    def gated(self, read: jax.Array, value: jax.Array, gates: jax.Array) -> jax.Array:
        normed = root_mean_square(read, self.eps) * self.norm[...].astype(jnp.float32)
        return normed * jax.nn.silu(gates.reshape(read.shape))


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
