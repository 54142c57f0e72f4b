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

    ``qkv`` is one matrix ``[hidden, kv_heads, group + 2, head_dim]``: for each KV head its query heads, its key and its
    value. One wide product is faster than three, and a shard of KV heads is a contiguous slice with all it needs.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        kv, group, dim, hidden = config.num_kv_heads, config.group_size, config.head_dim, config.hidden_size
        self.qkv = parameter((hidden, kv, group + 2, dim), ("embed", "kv_heads", None, None), dtype, rngs)
        self.out = parameter((kv, group, dim, hidden), ("kv_heads", None, None, "embed"), dtype, rngs)
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
        qkv = (x @ self.qkv[...].reshape(c.hidden_size, -1)).reshape(rows, c.num_kv_heads, c.group_size + 2, c.head_dim)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        q = rotate(qkv[:, :, : c.group_size].reshape(rows, c.num_heads, c.head_dim), *rope)
        k = rotate(qkv[:, :, c.group_size], *rope)
        cache = write_kv(cache, k, qkv[:, :, c.group_size + 1], inputs, layer)
        attended = paged_attention(q, cache, inputs, layer, scale=c.head_dim**-0.5)
        y = attended.reshape(rows, -1) @ self.out[...].reshape(-1, c.hidden_size)
        return (y if self.out_bias is None else y + self.out_bias[...]), cache


class GatedMLP(nnx.Module):
    """SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``; gate and up are one matrix ``[hidden, 2, inner]``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up = parameter((hidden, 2, inner), ("embed", None, "mlp"), dtype, rngs)
        self.down = parameter((inner, hidden), ("mlp", "embed"), dtype, rngs)
        bias = config.mlp_bias
        self.gate_up_bias = parameter((2, inner), (None, "mlp"), dtype, rngs) if bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, _, inner = self.gate_up.shape
        gate_up = (x @ self.gate_up[...].reshape(hidden, 2 * inner)).reshape(-1, 2, inner)
        if self.gate_up_bias is not None:
            gate_up = gate_up + self.gate_up_bias[...]
        y = (jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]) @ self.down[...]
        return y if self.down_bias is None else y + self.down_bias[...]


def transpose(weight: np.ndarray) -> np.ndarray:
    """A Linear of Hugging Face, ``[out, in]``, as ``[in, out]``."""
    return weight.T


def fuse_qkv(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Hugging Face's q, k and v, ``[heads * head_dim, hidden]`` or biases ``[heads * head_dim]``, as Attention.qkv."""
    kv, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    tail = q.shape[1:]
    parts = [q.reshape(kv, group, dim, *tail), k.reshape(kv, 1, dim, *tail), v.reshape(kv, 1, dim, *tail)]
    fused = np.concatenate(parts, axis=1)
    return np.moveaxis(fused, -1, 0) if tail else fused


def split_heads(config: ModelConfig, out: np.ndarray) -> np.ndarray:
    """Hugging Face's o_proj ``[hidden, heads * head_dim]`` as Attention.out."""
    return out.T.reshape(config.num_kv_heads, config.group_size, config.head_dim, -1)


def fuse_gate_up(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Hugging Face's gate and up, ``[inner, hidden]`` or biases ``[inner]``, as GatedMLP.gate_up."""
    fused = np.stack([gate, up])
    return np.moveaxis(fused, -1, 0) if gate.ndim == 2 else fused
