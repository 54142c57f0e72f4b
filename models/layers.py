"""Building blocks that model families share. T is the number of rows of a step's flat token batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.xla import rotate
from jaxserve.models.config import Memory, ModelConfig
from jaxserve.models.matrix import Gate, MatrixLayout
from jaxserve.models.norms import UnweightedNorm, make_head_norms

Axes = tuple[str | None, ...]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def gate_of(activation: str) -> Gate:
    """``act(gate) * up`` (arXiv 2002.05202)."""
    return lambda gate, up: ACTIVATIONS[activation](gate) * up


def parameter(
    shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, **metadata: MatrixLayout
) -> nnx.Param:
    """A normally distributed parameter whose dimensions carry logical axis names (sharding/rules.py maps them)."""
    values = jax.random.normal(rngs.params(), shape, dtype) * 0.02
    return nnx.Param(values, axes=axes, **metadata)


def matrix(
    shape: tuple[int, ...],
    axes: Axes,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    layout: MatrixLayout | None = None,
) -> nnx.Param:
    """A parameter that programs take as a Matrix."""
    return parameter(shape, axes, dtype, rngs, layout=layout or MatrixLayout())


class Tokens(NamedTuple):
    """What layers take of the rows' tokens, beside what the layers before them made."""

    ids: jax.Array
    """``int32[T]``"""
    embedded: jax.Array
    """``[T, hidden]``: what the first layer takes."""


class Positions(NamedTuple):
    """What layers take of the rows' positions, and of their tokens."""

    everywhere: Rotation
    """Of the layers that see everything."""
    local: Rotation
    """Of those with a window."""
    temperature: jax.Array | None
    """``float32[T]``: what queries grow by, in some layers."""
    tokens: Tokens | None = None
    """In models whose layers have embeddings of their own."""


class Attention(nnx.Module):
    """Grouped-query attention over the paged KV cache.

    ``qkv`` is one matrix ``[kv_heads, group + 2, head_dim, hidden]``: for each KV head its query heads, its key and its
    value. One wide product is faster than three, and a shard of KV heads is a contiguous slice with all it needs.
    """

    num_kept: ClassVar[int] = 2
    """Of each KV head beside its queries: its key and its value."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.is_local = config.memory(layer) is Memory.LOCAL_PAGES
        self.config = config = config.of_layer(layer)
        self.window = config.layer_window(layer)
        self.rotates = layer not in config.unrotated_layers
        self.has_temperature = config.temperature is not None and layer in config.temperature.layers
        kv, group, dim, hidden = config.num_held_kv_heads, config.group_size, config.head_dim, config.hidden_size
        width, axes = group + self.num_kept, ("kv_heads", None, None)
        self.qkv = matrix((kv, width, dim, hidden), (*axes, "embed"), dtype, rngs, MatrixLayout(num_outputs=3))
        self.out = matrix((hidden, kv, group, dim), ("embed", "kv_heads", None, None), dtype, rngs)
        self.qkv_bias = parameter((kv, width, dim), axes, dtype, rngs) if config.qkv_bias else None
        self.out_bias = parameter((hidden,), ("embed",), dtype, rngs) if config.out_bias else None
        self.sinks = parameter((kv, group), ("kv_heads", None), dtype, rngs) if config.attention_sinks else None
        self.gate = (
            matrix(
                (kv, group, dim, hidden), ("kv_heads", None, None, "embed"), dtype, rngs, MatrixLayout(num_outputs=3)
            )
            if config.attention_gate
            else None
        )
        self.q_norm, k_norm = make_head_norms(config, layer, dtype)
        self.k_norm = k_norm if self.num_kept else None
        self.v_norm = UnweightedNorm(config.norm_eps) if config.value_norm and self.num_kept else None

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        positions: Positions,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """``[T, hidden]`` -> ``[T, hidden]`` and the cache with this step's keys and values of ``layer``.

        rows: which of them count, as a Matrix takes it.
        """
        c = self.config
        q, cache = self.queries(self._projected(x, rows), positions, cache, inputs, layer)
        if self.has_temperature and positions.temperature is not None:
            q = (q * positions.temperature[:, None, None]).astype(q.dtype)
        attended = paged_attention(
            q, cache, inputs, layer, local=self.is_local,
            scale=c.attention_scale or c.head_dim**-0.5, window=self.window, softcap=c.attention_softcap,
            chunk=c.chunk_tokens if self.rotates else None,
            sinks=None if self.sinks is None else self.sinks[...].reshape(-1).astype(jnp.float32),
        ).reshape(len(x), -1)  # fmt: skip
        if self.gate is not None:
            attended = attended * jax.nn.sigmoid(self.gate.get_value().multiply(x, rows))
        y = self.out.get_value().multiply(attended, rows)
        return (y if self.out_bias is None else y + self.out_bias[...]), cache

    def queries(
        self, qkv: jax.Array, positions: Positions, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """Normed and rotated, ``[T, heads, head_dim]``, of ``[T, kv_heads, group + num_kept, head_dim]``, and the cache
        with what is kept."""
        if self.q_norm is not None and self.k_norm is not None:
            group = self.config.group_size
            q, k, v = jnp.split(qkv, (group, group + 1), axis=2)
            qkv = jnp.concatenate((self.q_norm(q), self.k_norm(k), self.v_norm(v) if self.v_norm else v), axis=2)
        return rotate_and_write(qkv, self.rotation(positions), cache, inputs, layer, local=self.is_local)

    def _projected(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        qkv = self.qkv.get_value().multiply(x, rows)
        qkv = qkv.reshape(len(x), self.config.num_held_kv_heads, -1, self.config.head_dim)
        return qkv if self.qkv_bias is None else qkv + self.qkv_bias[...]

    def rotation(self, positions: Positions) -> Rotation:
        """Of the layer's rows."""
        if not self.rotates:
            return None
        return positions.everywhere if self.window is None else positions.local


class ReadingAttention(Attention):
    """Reads an earlier layer's keys and values, and has none of its own. ``qkv`` has the queries."""

    num_kept = 0

    def queries(
        self, qkv: jax.Array, positions: Positions, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        q = qkv if self.q_norm is None else self.q_norm(qkv)
        rotation = self.rotation(positions)
        q = q if rotation is None else rotate(q, *rotation)
        return q.reshape(len(q), -1, self.config.head_dim), cache


class GatedMLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``; gate and up are one matrix ``[2, inner, hidden]``."""

    def __init__(self, config: ModelConfig, inner: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        hidden, bias = config.hidden_size, config.mlp_bias
        layout = MatrixLayout(
            num_outputs=2, gate=None if bias else config.activation, is_divided=config.tensor_parallel > 1
        )
        self.gate_up = matrix((2, inner, hidden), (None, "mlp", "embed"), dtype, rngs, layout)
        self.down = matrix((hidden, inner), ("embed", "mlp"), dtype, rngs)
        self.gate_up_bias = parameter((2, inner), (None, "mlp"), dtype, rngs) if bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if bias else None

    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """``[T, hidden]`` -> the same. rows: which of them count, as a Matrix takes it."""
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        inner = self.gate_up.get_value().gated(x, rows, gate_of(self.activation), bias)
        y = self.down.get_value().multiply(inner, rows)
        return y if self.down_bias is None else y + self.down_bias[...]


class MLP(nnx.Module):
    """``down(act(up(x)))``, the plain feed-forward layer of older models."""

    def __init__(self, config: ModelConfig, inner: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        hidden = config.hidden_size
        self.up = matrix((inner, hidden), ("mlp", "embed"), dtype, rngs)
        self.down = matrix((hidden, inner), ("embed", "mlp"), dtype, rngs)
        self.up_bias = parameter((inner,), ("mlp",), dtype, rngs) if config.mlp_bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if config.mlp_bias else None

    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """As GatedMLP's."""
        up = self.up.get_value().multiply(x, rows)
        inner = ACTIVATIONS[self.activation](up if self.up_bias is None else up + self.up_bias[...])
        y = self.down.get_value().multiply(inner, rows)
        return y if self.down_bias is None else y + self.down_bias[...]
