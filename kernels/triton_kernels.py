"""Kernels of paged attention for GPUs, in Triton; kernels/triton_launch.py launches them.

Attention is FlashAttention-2 (arXiv 2307.08691) over pages, one body for chunks and decodes: a tile's rows are query
rows times the query heads that share a KV head. Scores are kept in base 2, where exp is one instruction; statistics and
accumulators are float32.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-1e30)
"""The maximum of no scores. Finite, so that scores that nobody sees, -inf, weigh exp2(-inf) = 0 against it."""


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
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    values_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    KIND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
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
    STAGES: tl.constexpr,
) -> None:
    """All work items (kernels/plan.py) of one kind and all KV heads, by PROGRAMS programs.

    q, out: ``[T, heads, head_dim]``. k, v: ``[layers * pages, page_size, kv_heads, head_dim]``. tables: ``[sequences,
    TABLE_WIDTH]``. items: ``[n, 8]``, of which the first ``counts[KIND]`` are real. layer: one number. scales:
    ``[layers, 2]``, read if QUANTISED. values ``[partial rows, heads, head_dim]`` and stats ``[partial rows, heads,
    2]`` take unnormalised results, with the maximum of the scores and the sum of the weights. Without ``out`` all items
    have partial results. sinks: ``[heads]`` or none; they are in no partial result.
    UNMASKED: tiles that all rows see are walked without masking, in a loop of their own.
    """
    program = tl.program_id(0)
    num_jobs = tl.load(counts_ptr + KIND) * KV_HEADS
    for wave in tl.range(0, tl.cdiv(num_jobs, PROGRAMS), disable_licm=True):
        # Longest first, back and forth: who had the longest of a wave gets the shortest of the next.
        job = wave * PROGRAMS + tl.where(wave % 2 == 0, program, PROGRAMS - 1 - program)
        if job < num_jobs:
            attend_item(
                q_ptr, k_ptr, v_ptr, tables_ptr, items_ptr + job // KV_HEADS * 8, job % KV_HEADS, layer_ptr, scales_ptr,
                sinks_ptr, out_ptr, values_ptr, stats_ptr, SCALE, WINDOW, CHUNK, SOFTCAP, KV_HEADS, GROUP, HEAD_DIM,
                PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, QUANTISED, UNMASKED, BLOCK_ROWS, BLOCK_DIM, TILE, STAGES,
            )  # fmt: skip


@triton.jit
def attend_item(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    item_ptr: tl.tensor,
    kv_head: tl.tensor,
    layer_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    values_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
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
    STAGES: tl.constexpr,
) -> None:
    """One work item of one KV head: its output, or its partial result."""
    sequence = tl.load(item_ptr)
    first_row = tl.load(item_ptr + 1)
    num_rows = tl.load(item_ptr + 2)
    position = tl.load(item_ptr + 3)
    start = tl.load(item_ptr + 4) * PAGE_SIZE
    limit = tl.minimum(tl.load(item_ptr + 5) * PAGE_SIZE, tl.load(item_ptr + 6))
    partial_row = tl.load(item_ptr + 7)
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
    BOUNDED: tl.constexpr = WINDOW is not None or CHUNK is not None
    if BOUNDED:
        # Items begin where the widest window of the model does.
        ALIGN: tl.constexpr = PAGE_SIZE if PAGE_SIZE < TILE else TILE
        start = tl.maximum(start, _first_key(position, WINDOW, CHUNK) // ALIGN * ALIGN)

    head_offset = layer * (NUM_PAGES * PAGE_SIZE * KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
    k_ptr += head_offset
    v_ptr += head_offset
    tables_ptr += sequence * TABLE_WIDTH
    top = tl.full([BLOCK_ROWS], EMPTY, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    value = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    if sinks_ptr is not None:
        # A key that has been seen before all others; of parts, the combination sees it.
        top = tl.where(partial_row < 0, tl.load(sinks_ptr + head) * LOG2E, top)
        total = tl.where(partial_row < 0, 1.0, total)
    # Tiles from unmasked_start to unmasked_stop are seen by all rows whole; others are at an edge.
    unmasked_start = start
    unmasked_stop = start
    if UNMASKED:
        if BOUNDED:
            last_start = _first_key(position + num_rows - 1, WINDOW, CHUNK)
            unmasked_start += tl.cdiv(tl.maximum(last_start - start, 0), TILE) * TILE
        seen = tl.maximum(tl.minimum(position + 1, limit) - unmasked_start, 0)
        unmasked_stop = unmasked_start + seen // TILE * TILE
        for token in tl.range(unmasked_start, unmasked_stop, TILE, num_stages=STAGES):
            top, total, value = _attend_tile(
                q, top, total, value, token, limit, positions, k_ptr, v_ptr, tables_ptr, inner, factor,
                False, WINDOW, CHUNK, SOFTCAP, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_DIM, TILE,
            )  # fmt: skip
    skipped = unmasked_stop - unmasked_start
    for token in tl.range(start, limit - skipped, TILE, num_stages=STAGES):
        edge = tl.where(token < unmasked_start, token, token + skipped) if BOUNDED and UNMASKED else token + skipped
        top, total, value = _attend_tile(
            q, top, total, value, edge, limit, positions, k_ptr, v_ptr, tables_ptr, inner, factor,
            True, WINDOW, CHUNK, SOFTCAP, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_DIM, TILE,
        )  # fmt: skip

    if QUANTISED:
        value = value * tl.load(scales_ptr + layer * 2 + 1)
    if out_ptr is None:
        _store_partial(
            value, top, total, values_ptr, stats_ptr, partial_row + row, head, row < num_rows, mask,
            KV_HEADS * GROUP, HEAD_DIM, BLOCK_DIM,
        )  # fmt: skip
    elif partial_row < 0:
        normalised = value / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + places, normalised.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        _store_partial(
            value, top, total, values_ptr, stats_ptr, partial_row + row, head, row < num_rows, mask,
            KV_HEADS * GROUP, HEAD_DIM, BLOCK_DIM,
        )  # fmt: skip


@triton.jit
def _first_key(position: tl.tensor, WINDOW: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """See kernels/reach.py."""
    if CHUNK is not None:
        return position // CHUNK * CHUNK
    else:
        return position - (WINDOW - 1)


@triton.jit
def _store_partial(
    value: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    values_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    partial_row: tl.tensor,
    head: tl.tensor,
    real: tl.tensor,
    mask: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    partial = partial_row * HEADS + head
    tl.store(values_ptr + partial[:, None] * HEAD_DIM + tl.arange(0, BLOCK_DIM)[None, :], value, mask=mask)
    tl.store(stats_ptr + partial * 2, top, mask=real)
    tl.store(stats_ptr + partial * 2 + 1, total, mask=real)


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
    CHUNK: tl.constexpr,
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
        if WINDOW is not None or CHUNK is not None:
            visible = visible & (tokens[None, :] >= _first_key(positions, WINDOW, CHUNK)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    v = tl.load(v_ptr + places, mask=readable, other=0.0).to(q.dtype)
    value = tl.dot(weights.to(q.dtype), v, value * rescale[:, None], input_precision="ieee")
    return new_top, total * rescale + tl.sum(weights, 1), value


@triton.jit
def combine(
    decode_values_ptr: tl.tensor,
    decode_stats_ptr: tl.tensor,
    prefill_values_ptr: tl.tensor,
    prefill_stats_ptr: tl.tensor,
    combine_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    PROGRAMS: tl.constexpr,
    SHARES: tl.constexpr,
    PREFILL_PARTIAL: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """Put partial results together, as ``AttentionPlan.combine`` says, by PROGRAMS programs.

    An entry's results are its rows' heads, which lie together in each of its parts. SHARES programs share them. The
    plan's partial rows from PREFILL_PARTIAL on are prefill's, those before are decode's. sinks: as in ``attend``.
    """
    num_entries = tl.load(counts_ptr + 2)
    for job in range(tl.program_id(0), num_entries * SHARES, PROGRAMS):
        entry_ptr = combine_ptr + job % num_entries * 4
        share = job // num_entries
        first_result = tl.load(entry_ptr) * HEADS
        num_results = tl.load(entry_ptr + 1) * HEADS
        first_partial = tl.load(entry_ptr + 2)
        num_parts = tl.load(entry_ptr + 3)
        values_ptr = decode_values_ptr
        stats_ptr = decode_stats_ptr
        if first_partial >= PREFILL_PARTIAL:
            values_ptr = prefill_values_ptr
            stats_ptr = prefill_stats_ptr
            first_partial -= PREFILL_PARTIAL
        if num_parts <= 4:
            _combine_results(
                values_ptr, stats_ptr, sinks_ptr, out_ptr, first_result, num_results, first_partial * HEADS, num_parts,
                share, SHARES, HEADS, HEAD_DIM, BLOCK_DIM, 1, 32,
            )  # fmt: skip
        else:
            _combine_results(
                values_ptr, stats_ptr, sinks_ptr, out_ptr, first_result, num_results, first_partial * HEADS, num_parts,
                share, SHARES, HEADS, HEAD_DIM, BLOCK_DIM, 16, 2,
            )  # fmt: skip


@triton.jit
def _combine_results(
    values_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_result: tl.tensor,
    num_results: tl.tensor,
    first_partial: tl.tensor,
    num_parts: tl.tensor,
    share: tl.tensor,
    SHARES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    RESULTS: tl.constexpr,
) -> None:
    """One share of an entry's results, RESULTS at a time, of which PARTS parts are loaded at a time."""
    dim = tl.arange(0, BLOCK_DIM)
    for first in range(share * RESULTS, num_results, SHARES * RESULTS):
        result = first + tl.arange(0, RESULTS)
        top = tl.full([RESULTS], EMPTY, tl.float32)
        total = tl.zeros([RESULTS], tl.float32)
        value = tl.zeros([RESULTS, BLOCK_DIM], tl.float32)
        if sinks_ptr is not None:
            top = tl.load(sinks_ptr + result % HEADS) * LOG2E
            total += 1.0
        for first_part in range(0, num_parts, PARTS):
            part = first_part + tl.arange(0, PARTS)
            real = (part < num_parts)[:, None] & (result < num_results)[None, :]
            partial = first_partial + (part * num_results)[:, None] + result[None, :]
            tops = tl.load(stats_ptr + partial * 2, mask=real, other=EMPTY)
            totals = tl.load(stats_ptr + partial * 2 + 1, mask=real, other=0.0)
            mask = real[:, :, None] & (dim < HEAD_DIM)[None, None, :]
            values = tl.load(values_ptr + partial[:, :, None] * HEAD_DIM + dim[None, None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            rescale = tl.exp2(top - new_top)
            weights = tl.exp2(tops - new_top[None, :])
            value = value * rescale[:, None] + tl.sum(values * weights[:, :, None], 0)
            total = total * rescale + tl.sum(totals * weights, 0)
            top = new_top
        normalised = value / tl.where(total > 0, total, 1.0)[:, None]
        mask = (result < num_results)[:, None] & (dim < HEAD_DIM)[None, :]
        places = (first_result + result)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out_ptr + places, normalised.to(out_ptr.dtype.element_ty), mask=mask)
