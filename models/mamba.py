"""Mamba-2's state spaces (arXiv 2405.21060), as Granite 4 has them among its layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.recurrent import RuleRows
from jaxserve.models.config import ModelConfig, Recurrent
from jaxserve.models.layers import parameter
from jaxserve.models.norms import root_mean_square
from jaxserve.models.recurrent import RecurrentMixer
from jaxserve.models.reshape import by_head, convolution
from jaxserve.models.weights import Weight, whole


class Mamba2(RecurrentMixer):
    """In the words of kernels/recurrent.py a group is a key head: C its query, B its key, x the values of its heads.

    Their rates are time steps. ``skip`` is what passes the states by; a group's gate comes before its norm."""

    corrects = False

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.recurrent is not None
        super().__init__(config, config.recurrent.values_per_key, dtype, rngs)
        groups, values = self.net.num_key_heads, self.net.values_per_key
        self.skip = parameter((groups, values), ("kv_heads", None), dtype, rngs)
        self.norm = nnx.Param(jnp.ones((groups, self.net.value_rows), dtype), axes=("kv_heads", None))

    def rule_rows(self, query: jax.Array, key: jax.Array, value: jax.Array, rates: jax.Array) -> RuleRows:
        steps = self.steps(rates)
        return RuleRows(query, key, value, self.decays(steps), steps)

    def gated(self, read: jax.Array, value: jax.Array, gates: jax.Array) -> jax.Array:
        read = read + self.skip[...].astype(jnp.float32)[..., None] * value
        gated = read.reshape(gates.shape) * jax.nn.silu(gates)
        return root_mean_square(gated, self.eps) * self.norm[...].astype(jnp.float32)


def mamba2_weights(net: Recurrent, ours: str, theirs: str) -> dict[str, Weight]:
    """Of a Mamba2 at ``ours``, from the names of Granite 4."""
    groups, theirs = net.num_key_heads, f"{theirs}.mamba"
    inner, states = groups * net.value_rows, groups * net.key_dim
    channels = [  # x, then all B, then all C
        (0, net.value_rows, 2 * net.key_dim), (inner, net.key_dim, net.key_dim), (inner + states, net.key_dim, 0),
    ]  # fmt: skip
    projected = [(0, net.value_rows, net.num_channels), *((inner + row, each, to) for row, each, to in channels)]
    steps = [(2 * inner + 2 * states, net.values_per_key, 0)]
    heads = [(0, net.values_per_key, 0)]
    found = {
        f"{ours}.mixed": by_head(f"{theirs}.in_proj.weight", groups, projected),
        f"{ours}.rates": by_head(f"{theirs}.in_proj.weight", groups, steps),
        f"{ours}.kernel": convolution(f"{theirs}.conv1d.weight", groups, channels),
        f"{ours}.decay": by_head(f"{theirs}.A_log", groups, heads),
        f"{ours}.decay_bias": by_head(f"{theirs}.dt_bias", groups, heads),
        f"{ours}.skip": by_head(f"{theirs}.D", groups, heads),
        f"{ours}.norm": by_head(f"{theirs}.norm.weight", groups, [(0, net.value_rows, 0)]),
        f"{ours}.out": whole(
            f"{theirs}.out_proj.weight",
            lambda tensor: tensor.reshape(-1, groups, net.values_per_key, net.value_dim),
        ),
    }
    if net.conv_bias:
        found[f"{ours}.kernel_bias"] = by_head(f"{theirs}.conv1d.bias", groups, channels)
    return found
