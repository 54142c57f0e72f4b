"""Products of 4-bit codes with 16-bit numbers on GPUs, in Triton; kernels/triton_product.py launches them.

After MARLIN (arXiv 2408.11743), as far as Triton lets one: the product is computed transposed, so that the weights are
the operand that a matrix instruction takes from registers, and a batch of few rows is the one that is padded least. A
code becomes a number without a conversion: its four bits are or-ed into those of 128 (bfloat16) or 1,024 (float16),
where they are the lowest ones of the fraction, and what that is too large by, with the zero, is subtracted. Both are
exact. Scales are multiplied with sums over a group's inputs, not with weights.
"""

import triton
import triton.language as tl

# Two words in a register become two numbers. The compiler does not see that, and takes twice as many instructions of
# the kind that a multiprocessor has half as many units for. 0xea: (first & second) | third.
_DIGIT = "{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, 0x000f000f, {base:#010x}, 0xea; }}"
BFLOAT16_DIGITS = tl.constexpr(tuple(_DIGIT.format(shift=4 * j, base=0x43004300) for j in range(4)))
FLOAT16_DIGITS = tl.constexpr(tuple(_DIGIT.format(shift=4 * j, base=0x64006400) for j in range(4)))
"""Of a slice each."""


@triton.jit
def multiply(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    minima_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    SLICE: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCKS: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One tile of one part of ``x @ matrix.T``, where the matrix is ``(codes - zeros) * scales + minima``: that over
    PART_BLOCKS of the BLOCKS blocks of inputs.

    x: ``[ROWS, INPUTS]``, bfloat16 or float16. words: ``int16[OUTPUTS, BLOCKS * SLICE]``, see kernels/code_words.py.
    scales, minima: ``[INPUTS / GROUP, OUTPUTS]``; minima may be None. zeros: the same of x's type, larger by what codes
    are; None: all are ZERO. sums: float32 ``[., ROWS]`` of each CHAIN slices of x, where there are minima. out:
    ``[parts, ROWS, OUTPUTS]``. CHAIN: how many slices, of a block's, one after the other are of one group.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    part = tl.program_id(2)
    column = tl.arange(0, SLICE)
    real_rows = row < ROWS
    real_outputs = output < OUTPUTS
    x_places = row[:, None] * INPUTS + column[None, :]
    word_places = output[:, None] * (BLOCKS * SLICE) + column[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    DIGITS: tl.constexpr = BFLOAT16_DIGITS if dtype == tl.bfloat16 else FLOAT16_DIGITS
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for block in tl.range(part * PART_BLOCKS, tl.minimum((part + 1) * PART_BLOCKS, BLOCKS), num_stages=STAGES):
        words = tl.load(words_ptr + block * SLICE + word_places, mask=real_outputs[:, None], other=0)
        for j in tl.static_range(4):
            first = (block * 4 + j) * SLICE
            if j % CHAIN == 0:
                sums = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
                place = tl.minimum(first // GROUP, INPUTS // GROUP - 1) * OUTPUTS + output
                if zeros_ptr is None:
                    zeros = tl.full([1, 1], ZERO, dtype)
                else:
                    zeros = tl.load(zeros_ptr + place, mask=real_outputs, other=0.0)[:, None]
            numbers = tl.inline_asm_elementwise(
                DIGITS[j], "=r,r", [words], dtype=x_ptr.dtype.element_ty, is_pure=True, pack=2
            )
            real = real_rows[:, None]
            if INPUTS % (4 * SLICE) != 0:
                real = real & (first + column < INPUTS)[None, :]
            x = tl.load(x_ptr + first + x_places, mask=real, other=0.0)
            sums = tl.dot(numbers - zeros, tl.trans(x), sums)
            if j % CHAIN == CHAIN - 1:
                scales = tl.load(scales_ptr + place, mask=real_outputs, other=0.0).to(tl.float32)
                total += sums * scales[:, None]
                if minima_ptr is not None:
                    minima = tl.load(minima_ptr + place, mask=real_outputs, other=0.0).to(tl.float32)
                    chain = (block * 4 + j) // CHAIN
                    x_sums = tl.load(sums_ptr + chain * ROWS + row, mask=real_rows, other=0.0)
                    total += minima[:, None] * x_sums[None, :]
    out_ptrs = out_ptr + (part * ROWS + row)[None, :] * OUTPUTS + output[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=real_outputs[:, None] & real_rows[None, :])
