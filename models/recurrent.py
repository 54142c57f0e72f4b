"""What recurrent layers have in common (kernels/recurrent.py); a kind is a RecurrentMixer with a rule of its own."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import KVCache, RecurrentState
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.recurrent import RuleRows, convolve, recur
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import Positions, matrix, parameter
from jaxserve.models.matrix import MatrixLayout


class RecurrentMixer(nnx.Module):
    """Projections, a short convolution, a rule, a gated norm, and the way out.

    ``mixed`` is one matrix ``[key_heads, channels + gates, hidden]``: of each key head its query, key, values and the
    gates of the values' outputs. ``rates`` is ``[key_heads, num_rates, hidden]``, what a and b of the rule are made of.
    """

    corrects: ClassVar[bool]
    """See RunRows."""

    def __init__(self, config: ModelConfig, num_rates: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.recurrent is not None
        self.net, self.eps = config.recurrent, config.norm_eps
        heads, values, hidden = self.net.num_key_heads, self.net.values_per_key, config.hidden_size
        width, layout = self.net.num_channels + self.net.value_rows, MatrixLayout(num_outputs=2)
        channels = (heads, self.net.num_channels, self.net.conv_width)
        self.mixed = matrix((heads, width, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.rates = matrix((heads, num_rates, hidden), ("kv_heads", None, "embed"), dtype, rngs, layout)
        self.kernel = parameter(channels, ("kv_heads", None, None), dtype, rngs)
        self.kernel_bias = parameter(channels[:2], ("kv_heads", None), dtype, rngs) if self.net.conv_bias else None
        self.decay = parameter((heads, values), ("kv_heads", None), dtype, rngs)
        self.decay_bias = parameter((heads, values), ("kv_heads", None), dtype, rngs)
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
        rates = self.rates.get_value().multiply(x, rows, jnp.dtype("float32")).reshape(len(x), net.num_key_heads, -1)
        mixed, last = convolve(mixed, self.kernel[...], state.inputs, segments, layer, mesh=mesh)
        if self.kernel_bias is not None:
            mixed = mixed + self.kernel_bias[...].astype(jnp.float32)
        query, key, value = jnp.split(jax.nn.silu(mixed), (net.key_dim, 2 * net.key_dim), axis=-1)
        value = value.reshape(*value.shape[:2], net.values_per_key, net.value_dim)
        taken = self.rule_rows(query, key, value, rates)
        read, memory = recur(
            inputs.backend.recur, taken, state.memory, segments, layer, corrects=self.corrects, mesh=mesh
        )
        y = self.gated(read, value, gates.astype(jnp.float32)).astype(x.dtype)
        cache = cache._replace(recurrent=RecurrentState(last, memory))
        return self.out.get_value().multiply(y.reshape(len(x), -1), rows), cache

    def steps(self, fading: jax.Array) -> jax.Array:
        """How far each value head goes on, ``float32[T, key_heads, values_per_key]``."""
        return jax.nn.softplus(fading + self.decay_bias[...].astype(jnp.float32))

    def decays(self, steps: jax.Array) -> jax.Array:
        """log a of the rule, for such steps."""
        return -jnp.exp(self.decay[...].astype(jnp.float32)) * steps

    @abstractmethod
    def rule_rows(self, query: jax.Array, key: jax.Array, value: jax.Array, rates: jax.Array) -> RuleRows:
        """What rows bring to the rule; all are float32, rates ``[T, key_heads, num_rates]``."""

    @abstractmethod
    def gated(self, read: jax.Array, value: jax.Array, gates: jax.Array) -> jax.Array:
        """What goes out, of what rows read and of their values, ``[T, key_heads, values_per_key, value_dim]`` each, and
        their gates, ``[T, key_heads, values]``."""
