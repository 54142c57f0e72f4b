"""Native matrix products for CPUs, cpu_gemm.cc, by weights that are packed once, when they are loaded.

XLA's float32 products of a few rows take twice as long as reading the weights, and its bfloat16 ones much longer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels.native import MULTIPLY, PACK

PANEL = 16
"""Outputs that lie together."""
GATES = ("silu", "gelu_tanh")
"""Activations that a product can end with, in the order of cpu_gemm.cc's Gate, from 1 on."""


def pack(weight: jax.Array) -> jax.Array:
    """``[outputs, inputs]`` as the product reads it; only where native.available().

    ``[outputs / PANEL, inputs, PANEL]`` of float32, ``[outputs / PANEL, inputs / 2, PANEL, 2]`` of bfloat16; both
    divisions are rounded up, and what is not in the matrix is zero.
    """
    outputs, inputs = weight.shape
    num_panels = -(-outputs // PANEL)
    shape = (num_panels, -(-inputs // 2), PANEL, 2) if weight.dtype == jnp.bfloat16 else (num_panels, inputs, PANEL)
    return jax.ffi.ffi_call(PACK, jax.ShapeDtypeStruct(shape, weight.dtype))(weight)


def pack_pairs(weight: jax.Array) -> jax.Array:
    """Two matrices ``[2, outputs, inputs]``, for a product that ends with a gate: half a panel of each in turn."""
    half = PANEL // 2
    padded = jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % half), (0, 0)))
    return pack(padded.reshape(2, -1, half, weight.shape[2]).swapaxes(0, 1).reshape(-1, weight.shape[2]))


def multiply(
    x: jax.Array, panels: jax.Array, rows: jax.Array, num_outputs: int, out_dtype: jnp.dtype, gate: str | None
) -> jax.Array:
    """``x[rows] @ matrix.T``: ``[T, inputs]`` of the matrix's type -> ``[R, num_outputs]`` of it, or of float32.

    rows: ``int32[R]``; where it is negative the result is whatever was in memory. Sums are float32, and a row's do not
    depend on the other rows. gate: one of GATES, of panels from ``pack_pairs``: ``gate(x @ first.T) * (x @ second.T)``.
    """
    call = jax.ffi.ffi_call(MULTIPLY, jax.ShapeDtypeStruct((len(rows), num_outputs), out_dtype))
    return call(x, panels, rows, gate=np.int64(0 if gate is None else 1 + GATES.index(gate)))
