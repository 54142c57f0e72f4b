"""Prefill and decode in one launch, after POD-Attention (arXiv 2410.18038), in Triton.

Prefill is bound by arithmetic and decode by memory, so a multiprocessor that has a program of each does both in the
time of the longer. Two programs fit on one. Which kind a program begins with it decides when it runs, by where: the
first on a multiprocessor takes the one, the second the other. Items are drawn by number, so that whoever is free takes
the longest left, and a program whose kind has none left goes on with the other kind.
"""

import triton
import triton.language as tl

from jaxserve.kernels.triton_kernels import attend_item

DECODE = tl.constexpr(0)


@triton.jit
def attend_both(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    decode_items_ptr: tl.tensor,
    prefill_items_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    layer_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    tickets_ptr: tl.tensor,
    out_ptr: tl.tensor,
    prefill_values_ptr: tl.tensor,
    prefill_stats_ptr: tl.tensor,
    decode_values_ptr: tl.tensor,
    decode_stats_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    CORES: tl.constexpr,
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
    DECODE_ROWS: tl.constexpr,
    PREFILL_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
    DECODE_STAGES: tl.constexpr,
    PREFILL_STAGES: tl.constexpr,
) -> None:
    """The work items of both kinds, ``counts[3]`` of decode and ``counts[4]`` of prefill, by any number of programs.

    tickets: ``[2 + CORES]`` zeros: the numbers drawn of each kind, then the programs that began on each multiprocessor.
    The rest as in ``triton_kernels.attend``.
    """
    core = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    kind = tl.atomic_add(tickets_ptr + 2 + core % CORES, 1) % 2
    num_empty = 0
    while tl.condition(num_empty < 2, disable_licm=True):
        job = tl.atomic_add(tickets_ptr + kind, 1)
        if job >= tl.load(counts_ptr + 3 + kind) * KV_HEADS:
            kind = 1 - kind
            num_empty += 1
        elif kind == DECODE:
            attend_item(
                q_ptr, k_ptr, v_ptr, tables_ptr, decode_items_ptr + job // KV_HEADS * 8, job % KV_HEADS, layer_ptr,
                scales_ptr, None, None, decode_values_ptr, decode_stats_ptr, SCALE, WINDOW, CHUNK, SOFTCAP, KV_HEADS,
                GROUP, HEAD_DIM, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, QUANTISED, False, DECODE_ROWS, BLOCK_DIM, TILE,
                DECODE_STAGES,
            )  # fmt: skip
        else:
            attend_item(
                q_ptr, k_ptr, v_ptr, tables_ptr, prefill_items_ptr + job // KV_HEADS * 8, job % KV_HEADS, layer_ptr,
                scales_ptr, sinks_ptr, out_ptr, prefill_values_ptr, prefill_stats_ptr, SCALE, WINDOW, CHUNK, SOFTCAP,
                KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, NUM_PAGES, TABLE_WIDTH, QUANTISED, True, PREFILL_ROWS, BLOCK_DIM,
                TILE, PREFILL_STAGES,
            )  # fmt: skip
