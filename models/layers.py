"""Building blocks that model families share. T is the number of rows of a step's flat token batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.kernels.attention import AttentionInputs, KVCache, Rotation, paged_attention, rotate_and_write
from jaxserve.models.config import ModelConfig
from jaxserve.models.weights import Part, Weight, whole

Axes = tuple[str | None, ...]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


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


def norm_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    """The weights of a norm at ``ours`` from tensors named ``theirs``."""
    kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {f"{ours}.{kind}": whole(f"{theirs}.{kind}") for kind in kinds}


class Attention(nnx.Module):
    """Grouped-query attention over the paged KV cache.

    ``qkv`` is one matrix ``[kv_heads, group + 2, head_dim, hidden]``: for each KV head its query heads, its key and its
    value. One wide product is faster than three, and a shard of KV heads is a contiguous slice with all it needs.
    """

    def __init__(self, config: ModelConfig, window: int | None, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.window = window
        kv, group, dim, hidden = config.num_kv_heads, config.group_size, config.head_dim, config.hidden_size
        self.qkv = parameter((kv, group + 2, dim, hidden), ("kv_heads", None, None, "embed"), dtype, rngs)
        self.out = parameter((hidden, kv, group, dim), ("embed", "kv_heads", None, None), dtype, rngs)
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
        qkv = linear(x, self.qkv[...].reshape(-1, c.hidden_size))
        qkv = qkv.reshape(rows, c.num_kv_heads, c.group_size + 2, c.head_dim)
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
        y = linear(attended.reshape(rows, -1), self.out[...])
        return (y if self.out_bias is None else y + self.out_bias[...]), cache


class GatedMLP(nnx.Module):
    """``down(act(gate(x)) * up(x))`` (arXiv 2002.05202); gate and up are one matrix ``[2, inner, hidden]``."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
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
        y = linear(ACTIVATIONS[self.activation](gate_up[:, 0]) * gate_up[:, 1], self.down[...])
        return y if self.down_bias is None else y + self.down_bias[...]


class MLP(nnx.Module):
    """``down(act(up(x)))``, the plain feed-forward layer of older models."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up = parameter((inner, hidden), ("mlp", "embed"), dtype, rngs)
        self.down = parameter((hidden, inner), ("embed", "mlp"), dtype, rngs)
        self.up_bias = parameter((inner,), ("mlp",), dtype, rngs) if config.mlp_bias else None
        self.down_bias = parameter((hidden,), ("embed",), dtype, rngs) if config.mlp_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        up = linear(x, self.up[...])
        y = linear(ACTIVATIONS[self.activation](up if self.up_bias is None else up + self.up_bias[...]), self.down[...])
        return y if self.down_bias is None else y + self.down_bias[...]


def separate_qkv(config: ModelConfig, prefix: str, kind: str = "weight") -> Weight:
    """Attention.qkv, or its bias, from ``{prefix}.q_proj``, ``k_proj`` and ``v_proj``."""
    kv, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    sizes = {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}
    return tuple(
        Part(f"{prefix}.{name}_proj.{kind}", partial(_by_kv_head, kv, count, dim), (0, first))
        for name, (first, count) in sizes.items()
    )


def consecutive_qkv(config: ModelConfig, name: str, outputs_last: bool = False) -> Weight:
    """Attention.qkv, or its bias, from one tensor of all query rows, then all key rows, then all value rows."""
    kv, group, dim = config.num_kv_heads, config.group_size, config.head_dim

    def rows(first: int, count: int, tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.T if outputs_last else tensor
        if len(tensor) != (group + 2) * kv * dim:
            raise ValueError(f"{len(tensor)} rows, expected {(group + 2) * kv * dim}")
        return _by_kv_head(kv, count, dim, tensor[first * kv * dim : (first + count) * kv * dim])

    sizes = ((0, group), (group, 1), (group + 1, 1))
    return tuple(Part(name, partial(rows, first, count), (0, first)) for first, count in sizes)


def fused_qkv(config: ModelConfig, name: str) -> Weight:
    """Attention.qkv, or its bias, from one tensor that is ordered by KV head already: query rows, key, value."""
    return whole(name, partial(_by_kv_head, config.num_kv_heads, config.group_size + 2, config.head_dim))


def split_heads(config: ModelConfig, out: np.ndarray) -> np.ndarray:
    """Hugging Face's o_proj ``[hidden, heads * head_dim]`` as Attention.out."""
    return out.reshape(-1, config.num_kv_heads, config.group_size, config.head_dim)


def _by_kv_head(kv_heads: int, count: int, head_dim: int, tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(kv_heads, count, head_dim, *tensor.shape[1:])
