"""Native matrix products for CPUs by weights that are codes of 4 or 8 bits in memory, cpu_codes.cc."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels import cpu_gemm, native
from jaxserve.kernels.cpu_gemm import PANEL
from jaxserve.kernels.instruction_sets import AMX
from jaxserve.kernels.native import MULTIPLY_CODES

UNIT_BITS = 32


def outruns(dtype: jnp.dtype) -> bool:
    """Whether products are as fast as dense ones in ``dtype``, of many rows too. But on AMX they are float32's: not
    where the processor multiplies bfloat16. Only where native.available()."""
    instructions = native.instruction_set()
    assert instructions is not None, "available"
    return dtype == jnp.float32 or instructions is AMX or "avx512bf16" not in instructions.features


def packs(bits: int, group: int) -> bool:
    """Whether whole units of codes make a group."""
    return group % (UNIT_BITS // bits) == 0


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """``uint8[outputs, bytes]``, of 4 bits the first of two inputs in the low half, as the product reads them; only
    where native.available().

    ``uint32[outputs / PANEL, units, PANEL]``, a division that is rounded up. A unit is four codes of 8 bits, or eight
    of 4 bits: the first four of them are the low halves of its bytes, the others the high ones.
    """
    units = jax.lax.bitcast_convert_type(codes.reshape(len(codes), -1, UNIT_BITS // 8), jnp.uint32)
    if bits == 4:
        units = _spread(units & 0xFFFF) | _spread(units >> 16) << 4
    # It only moves numbers of 32 bits.
    return jax.lax.bitcast_convert_type(cpu_gemm.pack(jax.lax.bitcast_convert_type(units, jnp.float32)), jnp.uint32)


def pack_floats(values: jax.Array) -> jax.Array:
    """``[outputs, groups]`` -> ``[outputs / PANEL, groups, PANEL]``, which is rounded up."""
    padded = jnp.pad(values, [(0, -len(values) % PANEL), (0, 0)])
    return padded.reshape(-1, PANEL, values.shape[1]).mT


def unpack(units: jax.Array, bits: int) -> jax.Array:
    """``uint32[..., units]`` of an output -> its codes, ``uint8[..., inputs]``."""
    parts = jax.lax.bitcast_convert_type(units, jnp.uint8)
    if bits == 4:
        parts = jnp.stack([parts & 15, parts >> 4], axis=-2)
    return parts.reshape(*units.shape[:-1], -1)


def _spread(halves: jax.Array) -> jax.Array:
    """Four codes of 4 bits, from half a unit to the low halves of its bytes."""
    halves = (halves | halves << 8) & 0x00FF00FF
    return (halves | halves << 4) & 0x0F0F0F0F


def multiply(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    offsets: jax.Array | None,
    rows: jax.Array,
    num_outputs: int,
    out_dtype: jnp.dtype,
    gate: str | None,
    zero: int,
    is_int8: bool,
) -> jax.Array:
    """``x[rows] @ matrix.T``: ``[T, inputs]`` of float32 or bfloat16 -> ``[R, num_outputs]`` of it, or of float32.

    The matrix is ``codes * scales + offsets``, or ``(codes - zero) * scales`` without offsets: ``pack`` has made codes,
    and ``pack_floats`` the others, of float16 or float32. rows, gate: as cpu_gemm.multiply takes them, the latter of
    halves in turns. The result is that of the dequantised matrix there, to the last bit, in float32, and on AMX in
    bfloat16.

    is_int8: x is rounded to 8 bits first, with a scale for each group of inputs, or for 128 of them where groups have
    more. Sums of a group are then those of integers, and exact.
    """
    call = jax.ffi.ffi_call(MULTIPLY_CODES, jax.ShapeDtypeStruct((len(rows), num_outputs), out_dtype))
    # Without offsets they are a multiple of the scales.
    factor, offsets = (-zero, scales) if offsets is None else (1, offsets)
    number = 0 if gate is None else 1 + cpu_gemm.GATES.index(gate)
    return call(x, codes, scales, offsets, rows, gate=np.int64(number), factor=np.float32(factor), is_int8=is_int8)
