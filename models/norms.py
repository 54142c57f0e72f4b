"""Norms, and where a model has which."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cpu_norm import rms_norm, root_mean_square
from jaxserve.models.config import ModelConfig


class RMSNorm(nnx.Module):
    """Root-mean-square norm over as many dimensions as ``shape``, the weights', has; ``offset`` is added to the stored
    weights."""

    def __init__(
        self,
        shape: tuple[int, ...],
        eps: float,
        dtype: jnp.dtype,
        offset: float = 0.0,
        axes: tuple[str | None, ...] = ("embed",),
    ) -> None:
        self.eps = eps
        self.offset = offset
        self.weight = nnx.Param(jnp.full(shape, 1 - offset, dtype), axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps, self.offset)


class LayerNorm(nnx.Module):
    """Layer norm (arXiv 1607.06450), computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, *, has_bias: bool) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((size,), dtype), axes=("embed",)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        y = normed * self.weight[...].astype(jnp.float32)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class UnweightedNorm(nnx.Module):
    """Root-mean-square norm over the last dimension, without weights."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return root_mean_square(x, self.eps).astype(x.dtype)


Norm = RMSNorm | LayerNorm | UnweightedNorm


def make_norm(config: ModelConfig, dtype: jnp.dtype, size: int | None = None) -> Norm:
    """The model's kind of norm over ``size`` values, hidden_size by default."""
    size = size or config.hidden_size
    if config.norm in ("layer", "layer_no_bias"):
        return LayerNorm(size, config.norm_eps, dtype, has_bias=config.norm == "layer")
    return RMSNorm((size,), config.norm_eps, dtype, offset=1.0 if config.norm == "rms_plus_one" else 0.0)


def make_head_norms(config: ModelConfig, layer: int, dtype: jnp.dtype) -> tuple[Norm | None, Norm | None]:
    """Of queries ``[T, kv_heads, group, head_dim]`` and of keys ``[T, kv_heads, 1, head_dim]`` of layer number
    ``layer``."""
    kv, group, dim = config.num_held_kv_heads, config.group_size, config.head_dim
    if config.qk_norm == "head":
        return make_norm(config, dtype, dim), make_norm(config, dtype, dim)
    if config.qk_norm == "all_heads":
        axes = "kv_heads", None, None
        q, k = (RMSNorm((kv, heads, dim), config.norm_eps, dtype, axes=axes) for heads in (group, 1))
        return q, k
    if config.qk_norm == "unweighted" and layer not in config.unrotated_layers:
        return UnweightedNorm(config.norm_eps), UnweightedNorm(config.norm_eps)
    return None, None
