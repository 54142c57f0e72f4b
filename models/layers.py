"""Building blocks that model families share. T is the number of rows of a step's flat token batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.cpu_gemm import GATES, PackedMatrix
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.models.config import ModelConfig

Axes = tuple[str | None, ...]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def parameter(
    shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, **metadata: int | str | None
) -> nnx.Param:
    """A normally distributed parameter whose dimensions carry logical axis names (sharding/rules.py maps them)."""
    values = jax.random.normal(rngs.params(), shape, dtype) * 0.02
    return nnx.Param(values, axes=axes, **metadata)


def matrix(
    shape: tuple[int, ...],
    axes: Axes,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    num_outputs: int = 1,
    gate: str | None = None,
) -> nnx.Param:
    """A parameter for ``linear``: its first ``num_outputs`` dimensions are outputs, the others inputs.

    gate: of a matrix of two halves, one of cpu_gemm.GATES: native kernels multiply by both and join the results.
    """
    return parameter(shape, axes, dtype, rngs, num_outputs=num_outputs, gate=gate)


def linear(
    x: jax.Array, weight: nnx.Param, out_dtype: jnp.dtype | None = None, rows: jax.Array | None = None
) -> jax.Array:
    """``[T, in]`` by a ``matrix`` -> ``[T, out]``, in the operands' type or ``out_dtype``.

    rows: ``int32[R]``, of x those to multiply, -> ``[R, out]``; for a negative number the result is anything.

    Weights stay as Hugging Face stores them, outputs first: nothing is transposed at load, XLA's CPU products of few
    rows are up to 1.4 times faster than with ``[in, out]``, and GPU libraries take either. Where native kernels
    multiply, they are packed (models/packing.py).
    """
    value = weight.get_value()
    if isinstance(value, PackedMatrix):
        return value.multiply(x, out_dtype, rows)
    value = value.reshape(math.prod(value.shape[: weight.get_metadata("num_outputs")]), -1)
    x = x if rows is None else x[rows]
    return jax.lax.dot_general(x, value, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


def lookup(table: nnx.Param, numbers: jax.Array) -> jax.Array:
    """Rows ``numbers`` ``int32[T]`` of ``[vocab, hidden]`` -> ``[T, hidden]``."""
    value = table.get_value()
    return value.rows(numbers) if isinstance(value, PackedMatrix) else value[numbers]


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32; ``offset`` is added to the stored weights."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, offset: float = 0.0) -> None:
        self.eps = eps
        self.offset = offset
        self.weight = nnx.Param(jnp.full((size,), 1 - offset, dtype), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * (self.weight[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with a bias (arXiv 1607.06450), computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((size,), dtype), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def make_norm(config: ModelConfig, dtype: jnp.dtype, size: int | None = None) -> RMSNorm | LayerNorm:
    """The model's kind of norm over ``size`` values, hidden_size by default."""
    size = size or config.hidden_size
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps, dtype)
    return RMSNorm(size, config.norm_eps, dtype, offset=1.0 if config.norm == "rms_plus_one" else 0.0)


class Attention(nnx.Module):
    """Grouped-query attention over the paged KV cache.

    ``qkv`` is one matrix ``[kv_heads, group + 2, head_dim, hidden]``: for each KV head its query heads, its key and its
    value. One wide product is faster than three, and a shard of KV heads is a contiguous slice with all it needs.
    """

    def __init__(self, config: ModelConfig, window: int | None, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.window = window
        kv, group, dim, hidden = config.num_held_kv_heads, config.group_size, config.head_dim, config.hidden_size
        self.qkv = matrix((kv, group + 2, dim, hidden), ("kv_heads", None, None, "embed"), dtype, rngs, num_outputs=3)
        self.out = matrix((hidden, kv, group, dim), ("embed", "kv_heads", None, None), dtype, rngs)
        self.qkv_bias = (
            parameter((kv, group + 2, dim), ("kv_heads", None, None), dtype, rngs) if config.qkv_bias else None
        )
        self.out_bias = parameter((hidden,), ("embed",), dtype, rngs) if config.out_bias else None
        self.q_norm = make_norm(config, dtype, dim) if config.qk_norm else None
        self.k_norm = make_norm(config, dtype, dim) if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        rope: Rotation,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """``[T, hidden]`` -> ``[T, hidden]`` and the cache with this step's keys and values of ``layer``."""
        c, rows = self.config, x.shape[0]
        qkv = linear(x, self.qkv)
        qkv = qkv.reshape(rows, c.num_held_kv_heads, c.group_size + 2, c.head_dim)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = jnp.split(qkv, (c.group_size, c.group_size + 1), axis=2)
            qkv = jnp.concatenate((self.q_norm(q), self.k_norm(k), v), axis=2)
        q, cache = rotate_and_write(qkv, rope, cache, inputs, layer)
        attended = paged_attention(
            q, cache, inputs, layer,
            scale=c.attention_scale or c.head_dim**-0.5, window=self.window, softcap=c.attention_softcap,
        )  # fmt: skip
        y = linear(attended.reshape(rows, -1), self.out)
        return (y if self.out_bias is None else y + self.out_bias[...]), cache


class GatedMLP(nnx.Module):
    """``down(act(gate(x)) * up(x))`` (arXiv 2002.05202); gate and up are one matrix ``[2, inner, hidden]``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.is_divided = config.tensor_parallel > 1
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = config.mlp_bias
        gate = config.activation if config.activation in GATES and not bias else None
        self.gate_up = matrix((2, inner, hidden), (None, "mlp", "embed"), dtype, rngs, num_outputs=2, gate=gate)
        self.down = matrix((hidden, inner), ("embed", "mlp"), dtype, rngs)
        self.gate_up_bias = parameter((2, inner), (None, "mlp"), dtype, rngs) if bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = linear(self._gated(x), self.down)
        return y if self.down_bias is None else y + self.down_bias[...]

    def _gated(self, x: jax.Array) -> jax.Array:
        """``act(gate(x)) * up(x)``, ``[T, inner]``."""
        value = self.gate_up.get_value()
        if isinstance(value, PackedMatrix) and value.gate is not None:
            return value.multiply(x)
        if self.is_divided:
            # Not as one matrix: each device holds a share of both halves.
            gate_up = jnp.einsum("th,gih->tgi", x, value)
        else:
            # As one matrix: of three dimensions, XLA on CPUs transposes the weights in every step.
            gate_up = linear(x, self.gate_up).reshape(len(x), 2, -1)
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias[...]
        return ACTIVATIONS[self.activation](gate_up[:, 0]) * gate_up[:, 1]


class MLP(nnx.Module):
    """``down(act(up(x)))``, the plain feed-forward layer of older models."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up = matrix((inner, hidden), ("mlp", "embed"), dtype, rngs)
        self.down = matrix((hidden, inner), ("embed", "mlp"), dtype, rngs)
        self.up_bias = parameter((inner,), ("mlp",), dtype, rngs) if config.mlp_bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if config.mlp_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        up = linear(x, self.up)
        y = linear(ACTIVATIONS[self.activation](up if self.up_bias is None else up + self.up_bias[...]), self.down)
        return y if self.down_bias is None else y + self.down_bias[...]
