"""Native sums and norms of rows for CPUs, cpu_norm.cc: what lies between a layer's products, in bfloat16."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels import native


def serves(dtype: jnp.dtype) -> bool:
    """Whether C++ computes in ``dtype`` in programs for CPUs. In float32 XLA's order of summands stays."""
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and native.available()


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x + y`` of one shape."""
    if not serves(x.dtype):
        return x + y
    return jax.lax.platform_dependent(x, y, cpu=_add, default=jnp.add)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """``x / root mean square * (weight + offset)`` over the dimensions that ``weight`` has, in float32, as ``x`` is."""
    plain = partial(_plain_norm, eps=eps, offset=offset)
    if not serves(x.dtype):
        return plain(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=partial(_norm, eps=eps, offset=offset), default=plain)


def root_mean_square(x: jax.Array, eps: float, num_axes: int = 1) -> jax.Array:
    """``x`` in float32, divided by the root of its mean square over the last ``num_axes`` dimensions (arXiv
    1910.07467)."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=tuple(range(-num_axes, 0)), keepdims=True) + eps)


def _plain_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    return (root_mean_square(x, eps, weight.ndim) * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def _norm(x: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    call = jax.ffi.ffi_call(native.NORM, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, eps=np.float32(eps), offset=np.float32(offset))


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call(native.ADD, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, y)
