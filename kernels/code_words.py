"""4-bit codes in words of 16 bits, in the order in which the product of kernels/triton_codes.py takes them.

A block of inputs is cut into four slices, and digit j of the block's word i is the code of input i of slice j. So a
shift and a mask of what has been loaded give a whole slice of a matrix, in the layout that a matrix instruction wants;
nothing is joined or moved between threads. Words are as wide as the numbers that are made of them, so that two of them
in a register become two numbers at once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CODES = 4
"""In a word, and slices of a block."""
SLICES = (64, 32, 16)
"""Inputs of a slice. A matrix instruction takes 16 at a time; the words of 64 are a line of memory."""


class Codes(NamedTuple):
    """Of a matrix that is ``(codes - zeros) * scales + minima``."""

    words: jax.Array
    """``int16[outputs..., words]``, see ``pack``."""
    scales: jax.Array
    """Floats ``[groups, outputs...]``: a group of inputs of an output shares one."""
    zeros: jax.Array | None
    """As the scales; None: all are the same."""
    minima: jax.Array | None
    """As the scales; None: there are none."""


def slice_inputs(group: int) -> int | None:
    """As many as may be, so that no slice has inputs of two groups; None: ``group`` does not divide into slices."""
    return next((inputs for inputs in SLICES if group % inputs == 0), None)


def num_words(inputs: int, slice_inputs: int) -> int:
    """Of a row."""
    return -(-inputs // (CODES * slice_inputs)) * slice_inputs


def pack(codes: jax.Array, inputs: int) -> jax.Array:
    """``uint8[..., in / 2]``, the first of two codes in the low half, -> ``int16[..., words]`` of slices of ``inputs``.

    The last block is filled with zeros.
    """
    digits = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    padding = -digits.shape[-1] % (CODES * inputs)
    digits = jnp.pad(digits, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    slices = digits.reshape(*codes.shape[:-1], -1, CODES, inputs).astype(jnp.uint16)
    words = jnp.sum(slices << _shifts(), axis=-2, dtype=jnp.uint16)  # no two have a bit in common
    return jax.lax.bitcast_convert_type(words, jnp.int16).reshape(*codes.shape[:-1], -1)


def unpack(words: jax.Array, inputs: int) -> jax.Array:
    """``int16[..., words]`` -> ``uint8[..., 4 * words]``, the codes in the inputs' order, and zeros behind them."""
    blocks = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*words.shape[:-1], -1, 1, inputs)
    return ((blocks >> _shifts()) & 15).astype(jnp.uint8).reshape(*words.shape[:-1], -1)


def _shifts() -> jax.Array:
    """Of the slices."""
    return 4 * jnp.arange(CODES, dtype=jnp.uint16)[:, None]
