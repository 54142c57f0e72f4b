"""Products of groups of rows, each with a matrix of its own, on GPUs.

XLA makes of ``ragged_dot`` a product of all rows with all matrices, of which it masks what is not wanted.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxserve.kernels.backend import Target

GATES = ("silu", "gelu_tanh")
"""Activations that a product can end with."""
TILE_OUTPUTS = 128
"""Columns of a tile, of both halves together where there is a gate."""
TILE_INPUTS = 64
SMALLEST_TILE_ROWS = 16
WARPGROUP_ROWS = 64
"""Rows of a Hopper matrix product, which four warps make together."""
STAGES = 3


def multiply(
    x: jax.Array,
    weight: jax.Array,
    rows: jax.Array | None,
    group_sizes: jax.Array,
    out_dtype: jnp.dtype,
    gate: str | None,
    target: Target,
) -> jax.Array:
    """``x[rows] @ matrix`` of each group: ``[T, inputs]`` -> ``[R, outputs]``.

    weight: ``[G, inputs, outputs]``, or of two halves ``[2, G, inputs, outputs]``, whose outputs are one after the
    other, or with ``gate``, one of GATES, ``gate(first) * second``. rows: ``int32[R]``, of x; None: all, in order.
    group_sizes: ``int32[G]``, how many of them, one after the other, meet each matrix; of those behind the result is
    whatever was in memory.
    """
    from jaxserve.kernels import triton_groups, triton_launch  # they need packages that only GPUs do

    *halves, num_groups, inputs, outputs = weight.shape
    num_rows, num_halves = len(x if rows is None else rows), math.prod(halves)
    tile_rows = _tile_rows(num_rows, num_groups)
    tile_outputs = TILE_OUTPUTS if gate is None else TILE_OUTPUTS // 2
    made = 1 if gate is not None else num_halves
    # Whole tiles, and of each group that has rows one that is not.
    num_tiles = num_rows // tile_rows + min(num_groups, num_rows)
    return triton_launch.triton_call(
        x, weight, rows, group_sizes,
        kernel=triton_groups.multiply_groups,
        out_type=jax.ShapeDtypeStruct((num_rows, made * outputs), out_dtype),
        input_output_aliases={},
        grid=(made * -(-outputs // tile_outputs), num_tiles),
        num_warps=8 if tile_rows > WARPGROUP_ROWS else 4,
        compute_capability=target.compute_capability,
        backend_options=triton_launch.COMPILER_OPTIONS,
        GROUPS=num_groups,
        INPUTS=inputs,
        OUTPUTS=outputs,
        HALVES=num_halves,
        GATE=gate,
        BLOCK_GROUPS=_power_of_2(num_groups),
        BLOCK_ROWS=tile_rows,
        BLOCK_OUTPUTS=tile_outputs,
        BLOCK_INPUTS=TILE_INPUTS,
        STAGES=STAGES,
    )  # fmt: skip


def _tile_rows(num_rows: int, num_groups: int) -> int:
    """As many as a group has if all have as many. More than a warpgroup's only where groups have several such tiles:
    of an even share of them a third would be empty."""
    even = _power_of_2(-(-num_rows // num_groups))
    most = WARPGROUP_ROWS * (2 if even > 2 * WARPGROUP_ROWS else 1)
    return min(max(even, SMALLEST_TILE_ROWS), most)


def _power_of_2(size: int) -> int:
    """The first from ``size`` on."""
    return 1 << (size - 1).bit_length()
