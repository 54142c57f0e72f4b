"""The attention work list of one step, made on the host in numpy and shared by all layers.

A hybrid batch is cut into work items ``int32[8]``: sequence, first query row, number of rows, position of row 0,
first page, end page, KV length, first row of the partial result (-1: the item writes the output itself). Decode items
have the single query row of a sequence, prefill items a tile of a chunk's rows. Either may see only a part of the pages
(split-KV, as in Flash-Decoding): then the items of a tile leave partial results, which ``combine`` puts together. So
the work is the sum of the real lengths, and no long context keeps one processor busy while others idle. Where every
layer has an attention window, items start at the first page that the widest one reaches; where only some have, their
kernels skip what lies outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ITEM_FIELDS = 8
COMBINE_FIELDS = 4


class BusyItems(NamedTuple):
    """About how many work items, of each kind and for each KV head, keep a device busy."""

    decode: int
    prefill: int


@dataclass(frozen=True)
class Tiling:
    """How a backend wants a batch cut.

    Without ``busy`` every decode item is a part of at most ``decode_tokens`` tokens, with a partial result; prefill
    items see all their pages, and rows of no sequence are in none. With it, tiles are cut into parts of about equal
    length until there are about ``busy`` many, none much shorter than ``decode_tokens``; a tile in one part writes its
    output itself; the longest items come first; and rows of no sequence are in prefill items that see nothing, so that
    every row of the output is written.
    """

    decode_tokens: int
    prefill_rows: int
    """Most query rows of one prefill item, in a batch that has as many."""
    busy: BusyItems | None = None

    def decode_pages(self, page_size: int) -> int:
        return max(1, self.decode_tokens // page_size)

    def tile_rows(self, num_rows: int) -> int:
        """Most query rows of one prefill item in a batch of ``num_rows``."""
        return min(self.prefill_rows, num_rows)


@dataclass(frozen=True)
class PlanLimits:
    """Sizes that fix the work list's shape: of the step program, and of the engine."""

    num_rows: int
    """Rows T of the flat batch."""
    max_num_seqs: int
    max_model_len: int
    page_size: int
    num_pages: int
    tiling: Tiling
    window: int | None = None
    """The widest attention window, in tokens, when every layer has one, else None."""

    @property
    def tile_rows(self) -> int:
        return self.tiling.tile_rows(self.num_rows)

    @property
    def max_decode_items(self) -> int:
        if self.tiling.busy is not None:
            return self.tiling.busy.decode + self.max_num_seqs
        # Each running sequence ends in a partly filled part; all others are full, and pages are not shared.
        part_pages = self.tiling.decode_pages(self.page_size)
        pages_per_seq = -(-self.max_model_len // self.page_size)
        if self.window is not None:
            # A window touches most pages when it begins with the last token of one.
            pages_per_seq = min(pages_per_seq, 1 + -(-(self.window - 1) // self.page_size))
        by_length = self.max_num_seqs * -(-pages_per_seq // part_pages)
        by_memory = self.num_pages // part_pages + self.max_num_seqs
        return min(by_length, by_memory)

    @property
    def max_prefill_items(self) -> int:
        # Each chunk ends in a partly filled tile.
        tiles = self.num_rows // self.tile_rows + min(self.max_num_seqs, self.num_rows)
        return tiles if self.tiling.busy is None else tiles + 1 + self.tiling.busy.prefill

    @property
    def max_partial_rows(self) -> int:
        busy = self.tiling.busy
        if busy is None:
            return self.max_decode_items
        return _most_parts(busy.decode) + _most_parts(busy.prefill) * self.tile_rows

    @property
    def max_combines(self) -> int:
        busy = self.tiling.busy
        return self.max_num_seqs if busy is None else (_most_parts(busy.decode) + _most_parts(busy.prefill)) // 2


def _most_parts(busy: int) -> int:
    """Of tiles that are split at all: a share x of the work, in units of all / busy, makes round(x) <= 4/3 x parts."""
    return busy * 4 // 3


class AttentionPlan[Array](NamedTuple):
    """Real items come first; ``counts`` says how many are real."""

    decode: Array
    """``int32[max_decode_items, 8]``"""
    prefill: Array
    """``int32[max_prefill_items, 8]``"""
    combine: Array
    """``int32[max_combines, 4]``: first query row, number of rows, first partial row, number of parts.

    Partial row ``first + part * rows + i`` is the ``part``-th result of row ``i``. Unused entries start at row
    ``num_rows``.
    """
    counts: Array
    """``int32[3]``: decode items, prefill items, combines."""


def plan_shapes(limits: PlanLimits) -> dict[str, tuple[int, ...]]:
    return {
        "decode": (limits.max_decode_items, ITEM_FIELDS),
        "prefill": (limits.max_prefill_items, ITEM_FIELDS),
        "combine": (limits.max_combines, COMBINE_FIELDS),
        "counts": (3,),
    }


def make_plan(
    limits: PlanLimits,
    sequences: np.ndarray,
    query_lens: np.ndarray,
    kv_lens: np.ndarray,
    out: AttentionPlan[np.ndarray],
) -> None:
    """Write the work list of a batch into ``out``, which is as ``empty_plan`` leaves it.

    sequences, query_lens, kv_lens: ``int[n]``; sequence ``sequences[i]`` (a row of the block table) has
    ``query_lens[i]`` consecutive rows of the batch, the last at position ``kv_lens[i] - 1``.
    """
    tiling, busy = limits.tiling, limits.tiling.busy
    first_rows = np.cumsum(query_lens) - query_lens
    decoding = query_lens == 1
    batch = np.array((sequences, first_rows, query_lens, kv_lens))
    decodes, chunks = _see_all(limits, batch[:, decoding], kv_lens[decoding] - 1), batch[:, ~decoding]
    if busy is None:
        part_pages = tiling.decode_pages(limits.page_size)
        decode, combine = _cut(decodes, -(-_pages(decodes) // part_pages), 0, keep_whole=False)
        prefill, _ = _cut(_tiles(limits, chunks), None, 0)
    else:
        used = int(query_lens.sum())
        padding = np.array([[0], [used], [limits.num_rows - used], [0]])
        tiles = _tiles(limits, np.concatenate((chunks, padding), axis=1))
        decode, combine = _cut(decodes, _num_parts(limits, decodes, busy.decode), 0)
        partial_rows = int((combine[:, 1] * combine[:, 3]).sum())
        prefill, more = _cut(tiles, _num_parts(limits, tiles, busy.prefill), partial_rows)
        combine = np.concatenate((combine, more))
        decode, prefill = _longest_first(decode), _longest_first(prefill)
    for target, found in ((out.decode, decode), (out.prefill, prefill), (out.combine, combine)):
        target[: len(found)] = found
    out.counts[:] = len(decode), len(prefill), len(combine)


def new_plan(limits: PlanLimits) -> AttentionPlan[np.ndarray]:
    """Arrays of a plan's own, as ``empty_plan`` leaves them."""
    plan = AttentionPlan(**{name: np.zeros(shape, np.int32) for name, shape in plan_shapes(limits).items()})
    empty_plan(limits, plan)
    return plan


def empty_plan(limits: PlanLimits, out: AttentionPlan[np.ndarray]) -> None:
    """Make ``out``, all zeros, the plan of a batch without sequences."""
    out.combine[:, 0] = limits.num_rows


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 1, 3]: owners [0, 0, 1, 2, 2, 2] and ordinals [0, 1, 0, 0, 1, 2]."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _tiles(limits: PlanLimits, chunks: np.ndarray) -> np.ndarray:
    """Chunks ``[4, n]``, of sequence, first row, number of rows, KV length -> tiles of their rows."""
    tile_rows = limits.tile_rows
    owner, tile = _expand(-(-chunks[2] // tile_rows))
    sequence, row, num_rows, kv_len = chunks[:, owner]
    offset = tile * tile_rows
    position = np.maximum(kv_len - num_rows, 0) + offset
    num_rows = np.minimum(tile_rows, num_rows - offset)
    return _see_all(limits, np.array((sequence, row + offset, num_rows, kv_len)), position)


def _see_all(limits: PlanLimits, rows: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rows ``[4, n]``, of sequence, first row, number of rows, KV length, the first at ``position`` -> items ``[n, 8]``
    that see all they may and write the output."""
    sequence, row, num_rows, kv_len = rows
    end_page = -(-np.minimum(position + num_rows, kv_len) // limits.page_size)
    items = np.empty((len(position), ITEM_FIELDS), int)
    items[:, 0], items[:, 1], items[:, 2], items[:, 3] = sequence, row, num_rows, position
    items[:, 4], items[:, 5], items[:, 6], items[:, 7] = 0, end_page, kv_len, -1
    if limits.window is not None:
        first_page = np.maximum(position - limits.window + 1, 0) // limits.page_size
        items[:, 4] = np.minimum(first_page, end_page)
    return items


def _pages(items: np.ndarray) -> np.ndarray:
    return items[:, 5] - items[:, 4]


def _num_parts(limits: PlanLimits, tiles: np.ndarray, busy: int) -> np.ndarray | None:
    """How many parts each tile is cut into, so that all are about as long; at most ``busy`` more than tiles.

    None where none is cut.
    """
    pages = _pages(tiles)
    longest = max(limits.tiling.decode_pages(limits.page_size), pages.sum() / busy)
    if pages.max(initial=0) <= 1.5 * longest:
        return None
    return np.maximum(np.rint(pages / longest), 1).astype(int)


def _cut(
    tiles: np.ndarray, num_parts: np.ndarray | None, first_partial: int, *, keep_whole: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Work items, and what to combine. ``keep_whole``: a tile in one part has no partial result."""
    if num_parts is None:
        return tiles, np.empty((0, COMBINE_FIELDS), int)
    num_rows, split = tiles[:, 2], (num_parts > 1) | (not keep_whole)
    partial_rows = num_rows * num_parts * split
    partial = first_partial + np.cumsum(partial_rows) - partial_rows
    owner, part = _expand(num_parts)
    items, pages, parts = tiles[owner], _pages(tiles)[owner], num_parts[owner]
    begin = items[:, 4].copy()
    items[:, 4] = begin + pages * part // parts
    items[:, 5] = begin + pages * (part + 1) // parts
    items[:, 7] = np.where(split[owner], partial[owner] + part * num_rows[owner], -1)
    return items, np.array((tiles[split, 1], num_rows[split], partial[split], num_parts[split])).T


def _longest_first(items: np.ndarray) -> np.ndarray:
    """A processor that is free takes the next item, so long ones must not come last."""
    return items[np.argsort(-_pages(items), kind="stable")]
