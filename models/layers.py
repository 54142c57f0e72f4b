"""Building blocks that model families share. T is the number of rows of a step's flat token batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.kernels.attention import AttentionInputs, KVCache, paged_attention, write_kv
from jaxserve.models.config import ModelConfig
from jaxserve.models.rope import rotate

Axes = tuple[str | None, ...]


def parameter(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Param:
    """A normally distributed parameter whose dimensions carry logical axis names (sharding/rules.py maps them)."""
    values = jax.random.normal(rngs.params(), shape, dtype) * 0.02
    return nnx.Param(values, axes=axes)


def linear(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """``[T, in]`` by ``[out, ...in]`` -> ``[T, out]``, in the operands' type or ``out_dtype``.

    Weights stay as Hugging Face stores them, outputs first: nothing is transposed at load, XLA's CPU products of few
    rows are up to 1.4 times faster than with ``[in, out]``, and GPU libraries take either.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    return jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...]


class Attention(nnx.Module):
    """Grouped-query attention over the paged KV cache.

    ``qkv`` is one matrix ``[kv_heads, group + 2, head_dim, hidden]``: for each KV head its query heads, its key and its
    value. One wide product is faster than three, and a shard of KV heads is a contiguous slice with all it needs.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        kv, group, dim, hidden = config.num_kv_heads, config.group_size, config.head_dim, config.hidden_size
        self.qkv = parameter((kv, group + 2, dim, hidden), ("kv_heads", None, None, "embed"), dtype, rngs)
        self.out = parameter((hidden, kv, group, dim), ("embed", "kv_heads", None, None), dtype, rngs)
        bias = config.attention_bias
        self.qkv_bias = parameter((kv, group + 2, dim), ("kv_heads", None, None), dtype, rngs) if bias else None
        self.out_bias = parameter((hidden,), ("embed",), dtype, rngs) if bias else None

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """``[T, hidden]`` -> ``[T, hidden]`` and the cache with this step's keys and values of ``layer``."""
        c, rows = self.config, x.shape[0]
        qkv = linear(x, self.qkv[...].reshape(-1, c.hidden_size))
        qkv = qkv.reshape(rows, c.num_kv_heads, c.group_size + 2, c.head_dim)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        q = rotate(qkv[:, :, : c.group_size].reshape(rows, c.num_heads, c.head_dim), *rope)
        k = rotate(qkv[:, :, c.group_size], *rope)
        cache = write_kv(cache, k, qkv[:, :, c.group_size + 1], inputs, layer)
        attended = paged_attention(q, cache, inputs, layer, scale=c.head_dim**-0.5)
        y = linear(attended.reshape(rows, -1), self.out[...])
        return (y if self.out_bias is None else y + self.out_bias[...]), cache


class GatedMLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``; gate and up are one matrix ``[2, inner, hidden]``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = parameter((2, inner, hidden), (None, "mlp", "embed"), dtype, rngs)
        self.down = parameter((hidden, inner), ("embed", "mlp"), dtype, rngs)
        bias = config.mlp_bias
        self.gate_up_bias = parameter((2, inner), (None, "mlp"), dtype, rngs) if bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        _, inner, hidden = self.gate_up.shape
        gate_up = linear(x, self.gate_up[...].reshape(2 * inner, hidden)).reshape(-1, 2, inner)
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias[...]
        y = linear(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], self.down[...])
        return y if self.down_bias is None else y + self.down_bias[...]


def fuse_qkv(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Hugging Face's q, k and v, ``[heads * head_dim, hidden]`` or biases ``[heads * head_dim]``, as Attention.qkv."""
    kv, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    tail = q.shape[1:]
    parts = [q.reshape(kv, group, dim, *tail), k.reshape(kv, 1, dim, *tail), v.reshape(kv, 1, dim, *tail)]
    return np.concatenate(parts, axis=1)


def split_heads(config: ModelConfig, out: np.ndarray) -> np.ndarray:
    """Hugging Face's o_proj ``[hidden, heads * head_dim]`` as Attention.out."""
    return out.reshape(-1, config.num_kv_heads, config.group_size, config.head_dim)


def fuse_gate_up(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Hugging Face's gate and up, ``[inner, hidden]`` or biases ``[inner]``, as GatedMLP.gate_up."""
    return np.stack([gate, up])
