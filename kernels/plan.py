"""The attention work list of one step, made on the host in numpy and shared by all layers.

A hybrid batch is cut into work items ``int32[8]``: sequence, first query row, number of rows, position of row 0,
first page, end page, KV length, row of the partial result (-1: none). Decode items are one KV tile of a sequence with
a single query row, so a long context is split over many items (split-KV) and the work is the sum of the real lengths.
Prefill items are a tile of query rows that walks all its pages. Where every layer has an attention window, items start
at the first page that the widest one reaches; where only some have, their kernels skip what lies outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DECODE_TILE_TOKENS = 128
"""KV tokens of one decode item."""
PREFILL_TILE_ROWS = 64
"""Most query rows of one prefill item, in a batch that has as many."""
ITEM_FIELDS = 8


def decode_tile_pages(page_size: int) -> int:
    """Pages of one decode item."""
    return max(1, DECODE_TILE_TOKENS // page_size)


def prefill_tile_rows(num_rows: int) -> int:
    """Most query rows of one prefill item in a batch of ``num_rows``."""
    return min(PREFILL_TILE_ROWS, num_rows)


@dataclass(frozen=True)
class PlanLimits:
    """Sizes that fix the work list's shape: of the step program, and of the engine."""

    num_rows: int
    """Rows T of the flat batch."""
    max_num_seqs: int
    max_model_len: int
    page_size: int
    num_pages: int
    window: int | None = None
    """The widest attention window, in tokens, when every layer has one, else None."""

    @property
    def max_decode_items(self) -> int:
        """Each running sequence ends in a partly filled tile; all other tiles are full, and pages are not shared."""
        tile_pages = decode_tile_pages(self.page_size)
        pages_per_seq = -(-self.max_model_len // self.page_size)
        if self.window is not None:
            # A window touches most pages when it begins with the last token of one.
            pages_per_seq = min(pages_per_seq, 1 + -(-(self.window - 1) // self.page_size))
        by_length = self.max_num_seqs * -(-pages_per_seq // tile_pages)
        by_memory = self.num_pages // tile_pages + self.max_num_seqs
        return min(by_length, by_memory)

    @property
    def max_prefill_items(self) -> int:
        return self.num_rows // prefill_tile_rows(self.num_rows) + min(self.max_num_seqs, self.num_rows)


class AttentionPlan[Array](NamedTuple):
    """``decode`` and ``prefill`` hold work items, real ones first; ``counts`` says how many are real."""

    decode: Array
    """``int32[max_decode_items, 8]``"""
    prefill: Array
    """``int32[max_prefill_items, 8]``"""
    decode_rows: Array
    """``int32[max_num_seqs]``: the query row of each decoding sequence, ``num_rows`` for the others."""
    counts: Array
    """``int32[2]``: decode items, prefill items."""


def plan_shapes(limits: PlanLimits) -> dict[str, tuple[int, ...]]:
    return {
        "decode": (limits.max_decode_items, ITEM_FIELDS),
        "prefill": (limits.max_prefill_items, ITEM_FIELDS),
        "decode_rows": (limits.max_num_seqs,),
        "counts": (2,),
    }


def make_plan(
    limits: PlanLimits,
    sequences: np.ndarray,
    query_lens: np.ndarray,
    kv_lens: np.ndarray,
    out: AttentionPlan[np.ndarray],
) -> None:
    """Write the work list of a batch into ``out``.

    sequences, query_lens, kv_lens: ``int[n]``; sequence ``sequences[i]`` (a row of the block table) has
    ``query_lens[i]`` consecutive rows of the batch, the last at position ``kv_lens[i] - 1``.
    """
    first_rows = np.cumsum(query_lens) - query_lens
    decoding = query_lens == 1
    for array in out[:2]:
        array.fill(0)
    out.decode_rows.fill(limits.num_rows)
    out.decode_rows[sequences[decoding]] = first_rows[decoding]
    out.counts[0] = _decode_items(limits, sequences[decoding], first_rows[decoding], kv_lens[decoding], out.decode)
    chunks = ~decoding
    out.counts[1] = _prefill_items(
        limits, sequences[chunks], first_rows[chunks], query_lens[chunks], kv_lens[chunks], out.prefill
    )


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 1, 3]: owners [0, 0, 1, 2, 2, 2] and ordinals [0, 1, 0, 0, 1, 2]."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _first_page(limits: PlanLimits, positions: np.ndarray) -> np.ndarray:
    """The page of the first key that queries at ``positions`` see in any layer."""
    if limits.window is None:
        return np.zeros_like(positions)
    return np.maximum(positions - limits.window + 1, 0) // limits.page_size


def _decode_items(
    limits: PlanLimits, sequences: np.ndarray, rows: np.ndarray, kv_lens: np.ndarray, items: np.ndarray
) -> int:
    begin, end = _first_page(limits, kv_lens - 1), -(-kv_lens // limits.page_size)
    tile_pages = decode_tile_pages(limits.page_size)
    owner, tile = _expand(-(-(end - begin) // tile_pages))
    first_page = begin[owner] + tile * tile_pages
    end_page = np.minimum(first_page + tile_pages, end[owner])
    ones = np.ones_like(owner)
    columns = (
        sequences[owner], rows[owner], ones, kv_lens[owner] - 1, first_page, end_page, kv_lens[owner],
        np.arange(len(owner)),
    )  # fmt: skip
    items[: len(owner)] = np.stack(columns, axis=1)
    return len(owner)


def _prefill_items(
    limits: PlanLimits,
    sequences: np.ndarray,
    rows: np.ndarray,
    query_lens: np.ndarray,
    kv_lens: np.ndarray,
    items: np.ndarray,
) -> int:
    tile_rows = prefill_tile_rows(limits.num_rows)
    owner, tile = _expand(-(-query_lens // tile_rows))
    offset = tile * tile_rows
    num_rows = np.minimum(tile_rows, query_lens[owner] - offset)
    position = kv_lens[owner] - query_lens[owner] + offset
    end_page = -(-(position + num_rows) // limits.page_size)
    no_partial = np.full_like(owner, -1)
    columns = (
        sequences[owner], rows[owner] + offset, num_rows, position, _first_page(limits, position), end_page,
        kv_lens[owner], no_partial,
    )  # fmt: skip
    items[: len(owner)] = np.stack(columns, axis=1)
    return len(owner)
