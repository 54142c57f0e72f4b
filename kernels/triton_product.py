"""The Triton product of 4-bit codes in jax programs."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import triton_codes, triton_launch
from jaxserve.kernels.backend import Target
from jaxserve.kernels.code_words import CODES, Codes

BLOCK_OUTPUTS = 128
"""With fewer a multiprocessor would read more of x, from the L2 cache, than of the matrix."""
CHAINS = (4, 2, 1)
"""Slices of a block."""
LEAST_PART_INPUTS = 1024
"""A part's sums are written and read again, which so many inputs of 4 bits pay for."""


class Tile(NamedTuple):
    """How a product of so many rows is cut."""

    rows: int
    num_warps: int
    stages: int
    """Loads under way, as far as shared memory lets ``programs`` run on a multiprocessor at once."""
    programs: int

    @property
    def registers(self) -> int:
        """Of a thread; a warp gets 256 at a time."""
        return min(255, triton_launch.CORE_REGISTERS // (self.programs * self.num_warps) // 256 * 256 // 32)


TILES = (Tile(16, 4, 3, 3), Tile(32, 4, 3, 2), Tile(64, 8, 3, 1), Tile(128, 8, 2, 1))


def multiply(
    x: jax.Array, codes: Codes, *, inputs: int, group: int, zero: float, out_dtype: jnp.dtype, target: Target
) -> jax.Array:
    """``[T, in]`` -> ``[T, outputs]``; sums are float32. ``inputs``: of a slice; the rest as in triton_codes.multiply.

    A part of the inputs each where there are too few tiles for all multiprocessors; parts are added one after the
    other, so that a product is the same each time.
    """
    rows, num_inputs = x.shape
    outputs, num_words = codes.words.shape
    blocks = num_words // inputs
    tile = next((tile for tile in TILES if rows <= tile.rows), TILES[-1])
    grid = math.ceil(rows / tile.rows), math.ceil(outputs / BLOCK_OUTPUTS)
    most_parts = max(1, min(tile.programs * target.num_cores // math.prod(grid), num_inputs // LEAST_PART_INPUTS))
    part_blocks = math.ceil(blocks / most_parts)
    parts = math.ceil(blocks / part_blocks)
    chain = next(chain for chain in CHAINS if group % (chain * inputs) == 0)
    sums = None if codes.minima is None else _sums(x, blocks * CODES * inputs, chain * inputs)
    out = triton_launch.triton_call(
        x, codes.words, codes.scales, codes.zeros, codes.minima, sums,
        kernel=triton_codes.multiply,
        out_type=jax.ShapeDtypeStruct((parts, rows, outputs), out_dtype if parts == 1 else jnp.float32),
        input_output_aliases={},
        grid=(*grid, parts),
        name="multiply",
        num_warps=tile.num_warps,
        compute_capability=target.compute_capability,
        backend_options=triton_launch.COMPILER_OPTIONS | {"maxnreg": tile.registers},
        ROWS=rows,
        OUTPUTS=outputs,
        INPUTS=num_inputs,
        GROUP=group,
        ZERO=zero,
        SLICE=inputs,
        CHAIN=chain,
        BLOCKS=blocks,
        PART_BLOCKS=part_blocks,
        BLOCK_ROWS=tile.rows,
        BLOCK_OUTPUTS=BLOCK_OUTPUTS,
        STAGES=tile.stages,
    )  # fmt: skip
    return reduce(add, out).astype(out_dtype)


def _sums(x: jax.Array, num_inputs: int, chain_inputs: int) -> jax.Array:
    """``float32[., T]``, of ``chain_inputs`` of ``num_inputs`` at a time; those that x has not are zero."""
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, num_inputs - x.shape[1])))
    return padded.reshape(len(x), -1, chain_inputs).sum(-1).T
