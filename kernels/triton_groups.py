"""Products of groups of rows, each with a matrix of its own, for GPUs, in Triton; kernels/gpu_gemm.py launches them."""

import triton
import triton.language as tl


@triton.jit
def multiply_groups(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    sizes_ptr: tl.tensor,
    out_ptr: tl.tensor,
    GROUPS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HALVES: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One tile of rows that belong to one group, and BLOCK_OUTPUTS columns of what its matrix makes of them.

    x: ``[T, INPUTS]``. w: ``[HALVES, GROUPS, INPUTS, OUTPUTS]``. rows: ``[R]``, of x; none: all of x. sizes:
    ``[GROUPS]``, how many of these rows, one after the other, belong to each group. out: ``[R, HALVES, OUTPUTS]``, or
    with GATE, the activation between two halves, ``[R, OUTPUTS]``; rows of no group stay as they were.
    Which tile is whose follows from the sizes, which every program sums up for itself: it costs less than a kernel.
    """
    column_blocks = tl.cdiv(OUTPUTS, BLOCK_OUTPUTS)
    half = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    tile = tl.program_id(1)

    groups = tl.arange(0, BLOCK_GROUPS)
    sizes = tl.load(sizes_ptr + groups, mask=groups < GROUPS, other=0)
    tiles = tl.cdiv(sizes, BLOCK_ROWS)
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if group < GROUPS:
        is_before = groups < group
        offset = (tile - tl.sum(tl.where(is_before, tiles, 0), 0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = offset < tl.sum(tl.where(groups == group, sizes, 0), 0)
        row = tl.sum(tl.where(is_before, sizes, 0), 0) + offset
        source = row
        if rows_ptr is not None:
            source = tl.load(rows_ptr + row, mask=is_row, other=0)
        inputs = tl.arange(0, BLOCK_INPUTS)
        x_ptrs = x_ptr + source.to(tl.int64)[:, None] * INPUTS + inputs[None, :]
        first = (half * GROUPS + group).to(tl.int64) * (INPUTS * OUTPUTS)
        w_ptrs = w_ptr + first + inputs[:, None] * OUTPUTS + column[None, :]
        is_column = column < OUTPUTS
        sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
        values = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
        for begin in tl.range(0, INPUTS, BLOCK_INPUTS, num_stages=STAGES):
            x_mask = is_row[:, None]
            w_mask = is_column[None, :]
            if INPUTS % BLOCK_INPUTS != 0:
                is_input = inputs < INPUTS - begin
                x_mask = x_mask & is_input[None, :]
                w_mask = w_mask & is_input[:, None]
            x = tl.load(x_ptrs + begin, mask=x_mask, other=0.0)
            places = w_ptrs + begin * OUTPUTS
            sums = tl.dot(x, tl.load(places, mask=w_mask, other=0.0), sums, input_precision="ieee")
            if GATE is not None:
                second = places + tl.cast(GROUPS * INPUTS, tl.int64) * OUTPUTS
                values = tl.dot(x, tl.load(second, mask=w_mask, other=0.0), values, input_precision="ieee")
        if GATE is not None:
            z = sums
            if GATE == "gelu_tanh":
                z = 1.5957691216057308 * (sums + 0.044715 * sums * sums * sums)
            sums = sums / (1.0 + tl.exp(-z)) * values
        out_row = row.to(tl.int64) * HALVES + half
        if GATE is not None:
            out_row = row.to(tl.int64)
        places = out_row[:, None] * OUTPUTS + column[None, :]
        tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
