"""Rotating queries and keys and storing keys and values on GPUs, in Triton; kernels/triton_launch.py launches it."""

import triton
import triton.language as tl

FLOAT8_MAX = tl.constexpr(448.0)
"""Of float8_e4m3fn, which has no infinity: what is larger becomes NaN."""


@triton.jit
def rotate_and_write(
    qkv_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    layer_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    q_ptr: tl.tensor,
    NUM_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    LAYER_SLOTS: tl.constexpr,
    QUANTISED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One head, be it of a query, a key or a value, of BLOCK_ROWS rows: rotated, and put where it belongs.

    qkv: ``[T, kv_heads, group + 2, head_dim]``. q: ``[T, heads, head_dim]``. cos, sin: ``[T, HALF]``, read if HALF > 0.
    slots: ``[T]``; the layer's own begin at ``layer * LAYER_SLOTS``. k, v, layer, scales: as of triton_kernels.attend.
    """
    column = tl.program_id(0)
    kv_head = column // (GROUP + 2)
    part = column % (GROUP + 2)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    mask = (row < NUM_ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    places = (row * (KV_HEADS * (GROUP + 2)) + column)[:, None] * HEAD_DIM
    x = tl.load(qkv_ptr + places + dim[None, :], mask=mask, other=0.0)
    if HALF > 0:
        first = dim < HALF
        frequency = tl.where(first, dim, dim - HALF)
        partner = tl.where(first, dim + HALF, dim - HALF)
        num_turned = tl.where(part <= GROUP, 2 * HALF, 0)  # values are not rotated
        turned = mask & (dim < num_turned)[None, :]
        y = tl.load(qkv_ptr + places + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        angles = (row * HALF)[:, None] + frequency[None, :]
        cos = tl.load(cos_ptr + angles, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angles, mask=turned, other=0.0)
        x = (x.to(tl.float32) * cos + y * tl.where(first[None, :], -sin, sin)).to(x.dtype)
    if part < GROUP:
        tl.store(
            q_ptr + (row * (KV_HEADS * GROUP) + kv_head * GROUP + part)[:, None] * HEAD_DIM + dim[None, :], x, mask
        )
    else:
        layer = tl.load(layer_ptr).to(tl.int64)
        slots = layer * LAYER_SLOTS + tl.load(slots_ptr + row, mask=row < NUM_ROWS, other=0)
        targets = (slots * KV_HEADS + kv_head)[:, None] * HEAD_DIM + dim[None, :]
        if QUANTISED:
            scaled = x.to(tl.float32) / tl.load(scales_ptr + layer * 2 + part - GROUP)
            stored = tl.minimum(tl.maximum(scaled, -FLOAT8_MAX), FLOAT8_MAX).to(k_ptr.dtype.element_ty)
        else:
            stored = x.to(k_ptr.dtype.element_ty)
        if part == GROUP:
            tl.store(k_ptr + targets, stored, mask)
        else:
            tl.store(v_ptr + targets, stored, mask)
