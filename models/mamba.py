"""Mamba-2's state spaces (arXiv 2405.21060), as Granite 4 has them among its layers."""

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


class Mamba2(nnx.Module):
    """A short convolution, the states, what passes them by, a gate and a norm, and the way out.

    In the words of kernels/recurrent.py a group is a key head: C its query, B its key, and x the values of its heads.
    ``mixed`` is one matrix ``[groups, channels + gates, hidden]``; ``rates`` has the time steps of a group's heads.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.recurrent is not None
        self.net, self.eps = config.recurrent, config.norm_eps
        groups, values, hidden = self.net.num_key_heads, self.net.values_per_key, config.hidden_size
        width, layout = self.net.num_channels + self.net.value_rows, MatrixLayout(num_outputs=2)
        channels = (groups, self.net.num_channels, self.net.conv_width)
        self.mixed = matrix((groups, width, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.rates = matrix((groups, values, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.kernel = parameter(channels, ("kv_heads", None, None), dtype, rngs)
        self.kernel_bias = parameter(channels[:2], ("kv_heads", None), dtype, rngs) if self.net.conv_bias else None
        self.decay = parameter((groups, values), ("kv_heads", None), dtype, rngs)
        self.decay_bias = parameter((groups, values), ("kv_heads", None), dtype, rngs)
        self.skip = parameter((groups, values), ("kv_heads", None), dtype, rngs)
        self.norm = nnx.Param(jnp.ones((groups, self.net.value_rows), dtype), axes=("kv_heads", None))
        self.out = matrix((hidden, groups, self.net.value_rows), ("embed", "kv_heads", None), dtype, rngs)

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
        rates = self.rates.get_value().multiply(x, rows, jnp.dtype("float32")).reshape(len(x), net.num_key_heads, -1)
        steps = jax.nn.softplus(rates + self.decay_bias[...].astype(jnp.float32))
        decay = -jnp.exp(self.decay[...].astype(jnp.float32)) * steps

        mixed, last = convolve(mixed, self.kernel[...], state.inputs, segments, layer, mesh=mesh)
        if self.kernel_bias is not None:
            mixed = mixed + self.kernel_bias[...].astype(jnp.float32)
        query, key, value = jnp.split(jax.nn.silu(mixed), (net.key_dim, 2 * net.key_dim), axis=-1)
        value = value.reshape(*decay.shape, -1)
        taken = RuleRows(query, key, value, decay, steps)
        read, memory = recur(inputs.backend.recur, taken, state.memory, segments, layer, corrects=False, mesh=mesh)
        read = read + self.skip[...].astype(jnp.float32)[..., None] * value
        y = self._gated_norm(read.reshape(gates.shape), gates).astype(x.dtype)
        cache = cache._replace(recurrent=RecurrentState(last, memory))
        return self.out.get_value().multiply(y.reshape(len(x), -1), rows), cache

    def _gated_norm(self, read: jax.Array, gates: jax.Array) -> jax.Array:
        """Of a group's heads together."""
        gated = read * jax.nn.silu(gates.astype(jnp.float32))
        normed = gated * jax.lax.rsqrt(jnp.mean(gated * gated, axis=-1, keepdims=True) + self.eps)
        return normed * self.norm[...].astype(jnp.float32)


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
        f"{ours}.out": whole(f"{theirs}.out_proj.weight", lambda tensor: tensor.reshape(-1, groups, net.value_rows)),
    }
    if net.conv_bias:
        found[f"{ours}.kernel_bias"] = by_head(f"{theirs}.conv1d.bias", groups, channels)
    return found
