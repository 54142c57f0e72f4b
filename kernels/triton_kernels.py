"""Kernels of paged attention for GPUs, in Triton; kernels/triton_attention.py launches them.

Attention is FlashAttention-2 (arXiv 2307.08691) over pages, one body for chunks and decodes: a tile's rows are query
rows times the query heads that share a KV head. Scores are kept in base 2, where exp is one instruction; statistics and
accumulators are float32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-1e30)
"""The maximum of no scores. Finite, so that scores that nobody sees, -inf, weigh exp2(-inf) = 0 against it."""
FLOAT8_MAX = tl.constexpr(448.0)
"""Of float8_e4m3fn, which has no infinity: what is larger becomes NaN."""


@triton.jit
def attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    items_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    layer_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    values_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    QUANTISED: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One work item (kernels/plan.py) of one KV head: its output, or its partial result.

    q, out: ``[T, heads, head_dim]``. k, v: ``[layers * pages, page_size, kv_heads, head_dim]``. tables: ``[sequences,
    TABLE_WIDTH]``. items: ``[n, 8]``, of which the first ``counts[KIND]`` are real. layer: one number. scales:
    ``[layers, 2]``, read if QUANTISED. values ``[partial rows, heads, head_dim]`` and stats ``[partial rows, heads,
    2]`` take unnormalised results, with the maximum of the scores and the sum of the weights.
    UNMASKED: tiles that all rows see are walked without masking, in a loop of their own.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(counts_ptr + KIND):
        return
    items_ptr += item * 8
    sequence = tl.load(items_ptr)
    first_row = tl.load(items_ptr + 1)
    num_rows = tl.load(items_ptr + 2)
    position = tl.load(items_ptr + 3)
    start = tl.load(items_ptr + 4) * PAGE_SIZE
    limit = tl.minimum(tl.load(items_ptr + 5) * PAGE_SIZE, tl.load(items_ptr + 6))
    partial_row = tl.load(items_ptr + 7)
    layer = tl.load(layer_ptr).to(tl.int64)

    tile_row = tl.arange(0, BLOCK_ROWS)
    row = tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    dim = tl.arange(0, BLOCK_DIM)
    mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    places = ((first_row + row) * (KV_HEADS * GROUP) + head)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + places, mask=mask, other=0.0)
    positions = position + row

    scale = SCALE
    if QUANTISED:
        scale = SCALE * tl.load(scales_ptr + layer * 2)
    # Raw scores become base 2 by one factor; with a soft cap tanh stands between, and the factor is the cap's.
    inner = scale
    factor = scale * LOG2E
    if SOFTCAP is not None:
        inner = scale / SOFTCAP
        factor = SOFTCAP * LOG2E
    if WINDOW is not None:
        # Items begin where the widest window of the model does.
        ALIGN: tl.constexpr = PAGE_SIZE if PAGE_SIZE < TILE else TILE
        start = tl.maximum(start, (position - WINDOW + 1) // ALIGN * ALIGN)

    head_offset = layer * (NUM_PAGES * PAGE_SIZE * KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    k_ptr += head_offset
    v_ptr += head_offset
    tables_ptr += sequence * TABLE_WIDTH
    top = tl.full([BLOCK_ROWS], EMPTY, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    value = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    masked_start = start
    if UNMASKED:
        masked_start += tl.maximum(tl.minimum(position + 1, limit) - start, 0) // TILE * TILE
        for token in range(start, masked_start, TILE):
            top, total, value = _attend_tile(
                q, top, total, value, token, limit, positions, k_ptr, v_ptr, tables_ptr, inner, factor,
                False, WINDOW, SOFTCAP, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_DIM, TILE,
            )  # fmt: skip
    for token in range(masked_start, limit, TILE):
        top, total, value = _attend_tile(
            q, top, total, value, token, limit, positions, k_ptr, v_ptr, tables_ptr, inner, factor,
            True, WINDOW, SOFTCAP, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_DIM, TILE,
        )  # fmt: skip

    if QUANTISED:
        value = value * tl.load(scales_ptr + layer * 2 + 1)
    if partial_row < 0:
        normalised = value / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + places, normalised.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        partial = (partial_row + row) * (KV_HEADS * GROUP) + head
        tl.store(values_ptr + partial[:, None] * HEAD_DIM + dim[None, :], value, mask=mask)
        tl.store(stats_ptr + partial * 2, top, mask=row < num_rows)
        tl.store(stats_ptr + partial * 2 + 1, total, mask=row < num_rows)


@triton.jit
def _attend_tile(
    q: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    value: tl.tensor,
    token: tl.tensor,
    limit: tl.tensor,
    positions: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax: the maximum, sum and accumulator after the TILE tokens from ``token`` on.

    Without MASKED all of them are before ``limit`` and seen by all rows; with it nothing from ``limit`` on is read.
    """
    tokens = token + tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK_DIM)
    if PAGE_SIZE < TILE:
        page = tl.load(table_ptr + tokens // PAGE_SIZE, mask=tokens < limit, other=0)
    else:
        page = tl.load(table_ptr + token // PAGE_SIZE)
    slots = page.to(tl.int64) * PAGE_SIZE + tokens % PAGE_SIZE
    places = slots[:, None] * TOKEN_STRIDE + dim[None, :]
    readable = (dim < HEAD_DIM)[None, :]
    if MASKED:
        readable = readable & (tokens < limit)[:, None]
    k = tl.load(k_ptr + places, mask=readable, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP is not None:
        scores = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E * inner)) + 1.0)
    if MASKED:
        visible = tokens[None, :] <= tl.minimum(positions, limit - 1)[:, None]
        if WINDOW is not None:
            visible = visible & (tokens[None, :] > (positions - WINDOW)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    v = tl.load(v_ptr + places, mask=readable, other=0.0).to(q.dtype)
    value = tl.dot(weights.to(q.dtype), v, value * rescale[:, None], input_precision="ieee")
    return new_top, total * rescale + tl.sum(weights, 1), value


@triton.jit
def combine(
    values_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    combine_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """Put the partial results of one head and one entry of ``AttentionPlan.combine`` together, PARTS at a time.

    PROGRAMS programs share an entry's rows.
    """
    head = tl.program_id(0)
    entry = tl.program_id(2)
    if entry >= tl.load(counts_ptr + 2):
        return
    combine_ptr += entry * 4
    first_row = tl.load(combine_ptr)
    num_rows = tl.load(combine_ptr + 1)
    first_partial = tl.load(combine_ptr + 2)
    num_parts = tl.load(combine_ptr + 3)
    dim = tl.arange(0, BLOCK_DIM)
    for row in range(tl.program_id(1), num_rows, PROGRAMS):
        top = EMPTY
        total = 0.0
        value = tl.zeros([BLOCK_DIM], tl.float32)
        for first_part in range(0, num_parts, PARTS):
            part = first_part + tl.arange(0, PARTS)
            real = part < num_parts
            partial = (first_partial + part * num_rows + row) * HEADS + head
            tops = tl.load(stats_ptr + partial * 2, mask=real, other=EMPTY)
            totals = tl.load(stats_ptr + partial * 2 + 1, mask=real, other=0.0)
            mask = real[:, None] & (dim < HEAD_DIM)[None, :]
            values = tl.load(values_ptr + partial[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            rescale = tl.exp2(top - new_top)
            shares = tl.exp2(tops - new_top)
            value = value * rescale + tl.sum(values * shares[:, None], 0)
            total = total * rescale + tl.sum(totals * shares, 0)
            top = new_top
        normalised = value / tl.where(total > 0, total, 1.0)
        place = ((first_row + row) * HEADS + head) * HEAD_DIM + dim
        tl.store(out_ptr + place, normalised.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


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
    slots: ``[T]``; the layer's own begin at ``layer * LAYER_SLOTS``. k, v, layer and scales as in ``attend``.
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
