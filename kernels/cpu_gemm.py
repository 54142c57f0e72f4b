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
    """``[..., outputs, inputs]`` as the product reads it; only where native.available().

    ``[..., outputs / PANEL, inputs, PANEL]`` of float32, ``[..., outputs / PANEL, inputs / 2, PANEL, 2]`` of bfloat16;
    both divisions are rounded up, and what is not in a matrix is zero.
    """
    *groups, outputs, inputs = weight.shape
    num_panels = -(-outputs // PANEL)
    rows = _padded(weight, PANEL).reshape(-1, inputs)
    panel = (-(-inputs // 2), PANEL, 2) if weight.dtype == jnp.bfloat16 else (inputs, PANEL)
    call = jax.ffi.ffi_call(PACK, jax.ShapeDtypeStruct((len(rows) // PANEL, *panel), weight.dtype))
    return call(rows).reshape(*groups, num_panels, *panel)


def pack_pairs(weight: jax.Array) -> jax.Array:
    """``[..., 2 * outputs, inputs]``, for a product that ends with a gate."""
    return pack(in_turns(weight))


def in_turns(weight: jax.Array) -> jax.Array:
    """``[..., 2 * outputs, inputs]`` with half a panel of each half in turn; an output that is not there is zero."""
    *groups, outputs, inputs = weight.shape
    half = PANEL // 2
    halves = _padded(weight.reshape(*groups, 2, outputs // 2, inputs), half)
    return halves.reshape(*groups, 2, -1, half, inputs).swapaxes(-4, -3).reshape(*groups, -1, inputs)


def _padded(weight: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(weight, [(0, 0)] * (weight.ndim - 2) + [(0, -weight.shape[-2] % multiple), (0, 0)])


def multiply(
    x: jax.Array,
    panels: jax.Array,
    rows: jax.Array,
    group_sizes: jax.Array,
    num_outputs: int,
    out_dtype: jnp.dtype,
    gate: str | None,
) -> jax.Array:
    """``x[rows] @ matrix.T``: ``[T, inputs]`` of the matrix's type -> ``[R, num_outputs]`` of it, or of float32.

    rows: ``int32[R]``; where it is negative the result is whatever was in memory. group_sizes: ``int32[G]``, how many
    of them, one after the other, meet each of the matrices that panels ``[G, ...]`` are of, or panels without that
    dimension where G is 1. Sums are float32, and a row's do not depend on the other rows. gate: one of GATES, of panels
    from ``pack_pairs``: ``gate(x @ first.T) * (x @ second.T)``.
    """
    call = jax.ffi.ffi_call(MULTIPLY, jax.ShapeDtypeStruct((len(rows), num_outputs), out_dtype))
    return call(x, panels, rows, group_sizes, gate=np.int64(0 if gate is None else 1 + GATES.index(gate)))
