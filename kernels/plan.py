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

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ITEM_FIELDS = 8
COMBINE_FIELDS = 4


class ItemCost(NamedTuple):
    """What an item costs a GPU besides its pages, in tokens: an estimate."""

    item: int
    """Of every item: finding its pages, filling the pipeline of loads, writing the result."""
    part: int
    """Of parts of tiles besides: their results are float32, and read again."""


DECODE_COST, PREFILL_COST = ItemCost(64, 0), ItemCost(96, 32)
MOST_WAVES = 4
"""Programs of parts, by those that run at once: more parts cost more than their better balance gains."""
GOOD_BALANCE = 0.95
"""Share of busy processors from which on no better cut is looked for."""
LEAST_GAIN = 0.98
"""Of the time that whole tiles take a cut must take less than this share."""
UNCUT_EXCESS = 0.25
"""By how much of a part's length a tile may be longer without another cut."""


class BusyPrograms(NamedTuple):
    """How many programs, of each kind, a device runs at once. An item takes one for each of ``kv_heads``."""

    decode: int
    prefill: int
    kv_heads: int = 1

    @property
    def decode_parts(self) -> int:
        """The most of all decodes that are split."""
        return MOST_WAVES * self.decode // self.kv_heads

    @property
    def prefill_parts(self) -> int:
        """The most of all prefill tiles that are split."""
        return MOST_WAVES * self.prefill // self.kv_heads


@dataclass(frozen=True)
class Tiling:
    """How a backend wants a batch cut.

    Every decode item has a partial result. Without ``busy`` it is a part of at most ``decode_tokens`` tokens, cut where
    their positions are multiples of that, so that a row's sums do not depend on how far the plan lets it see; prefill
    items see all their pages, and rows of no sequence are in none. With it, tiles are cut into parts of equal length,
    none shorter than ``decode_tokens``, so that ``busy`` many programs are done as early as possible; a prefill tile in
    one part writes its output itself; the longest items come first; and rows of no sequence are in prefill items that
    see nothing, so that every row of the output is written.
    """

    decode_tokens: int
    prefill_rows: int
    """Most query rows of one prefill item, in a batch that has as many."""
    busy: BusyPrograms | None = None
    fused: BusyPrograms | None = None
    """The same of a launch that takes items of both kinds, in batches that have both; None: there is none."""

    @property
    def most_decode_parts(self) -> int:
        return max(busy.decode_parts for busy in (self.busy, self.fused) if busy is not None)

    @property
    def most_prefill_parts(self) -> int:
        return max(busy.prefill_parts for busy in (self.busy, self.fused) if busy is not None)

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
    max_drafts: int = 0
    """Single rows beside one for each sequence: drafts of its next tokens, all at work at once."""

    @property
    def max_decodes(self) -> int:
        """Single rows that are in decode items."""
        return self.max_num_seqs + self.max_drafts

    @property
    def tile_rows(self) -> int:
        return self.tiling.tile_rows(self.num_rows)

    @property
    def max_decode_items(self) -> int:
        if self.tiling.busy is not None:
            return self.max_decodes + self.tiling.most_decode_parts
        # Each running sequence ends in a partly filled part; all others are full. Where sequences share so many pages
        # that this is too few, make_plan makes prefill items of what is left.
        part_pages = self.tiling.decode_pages(self.page_size)
        parts_per_row = -(-self.max_model_len // (self.page_size * part_pages))
        if self.window is not None:
            # A window touches most parts when it begins with the last token of one.
            window_pages = -(-(self.window - 1) // self.page_size)
            parts_per_row = min(parts_per_row, 1 + -(-window_pages // part_pages))
        by_length = self.max_decodes * parts_per_row
        if self.max_drafts:  # a sequence's rows all see its pages, and the device moves decode items only
            return by_length
        by_memory = self.num_pages // part_pages + self.max_num_seqs
        return min(by_length, by_memory)

    @property
    def max_prefill_items(self) -> int:
        # Each chunk ends in a partly filled tile.
        tiles = self.num_rows // self.tile_rows + min(self.max_num_seqs, self.num_rows)
        return tiles if self.tiling.busy is None else tiles + 1 + self.tiling.most_prefill_parts

    @property
    def max_prefill_partials(self) -> int:
        """Rows of partial results that prefill items leave; a decode item leaves one."""
        return 0 if self.tiling.busy is None else self.tiling.most_prefill_parts * self.tile_rows

    @property
    def max_partial_rows(self) -> int:
        return self.max_decode_items + self.max_prefill_partials

    @property
    def max_combines(self) -> int:
        return self.max_decodes + (0 if self.tiling.busy is None else self.tiling.most_prefill_parts // 2)


class AttentionPlan[Array](NamedTuple):
    """Real items come first; ``counts`` says how many are real."""

    decode: Array
    """``int32[max_decode_items, 8]``"""
    prefill: Array
    """``int32[max_prefill_items, 8]``"""
    combine: Array
    """``int32[max_combines, 4]``: first query row, number of rows, first partial row, number of parts.

    Partial row ``first + part * rows + i`` is the ``part``-th result of row ``i``; those from ``max_decode_items`` on
    are of prefill items, which count their own from 0. Unused entries start at row ``num_rows``.
    """
    counts: Array
    """``int32[3]``: decode items, prefill items, combines. With a fused launch ``int32[5]``: also the decode items and
    the prefill items that it takes; then the first two are 0."""


def plan_shapes(limits: PlanLimits) -> dict[str, tuple[int, ...]]:
    return {
        "decode": (limits.max_decode_items, ITEM_FIELDS),
        "prefill": (limits.max_prefill_items, ITEM_FIELDS),
        "combine": (limits.max_combines, COMBINE_FIELDS),
        "counts": (3 if limits.tiling.fused is None else 5,),
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
    tiling = limits.tiling
    first_rows = np.cumsum(query_lens) - query_lens
    batch = np.array((sequences, first_rows, query_lens, kv_lens))
    decoding = query_lens == 1
    decodes = _see_all(limits, batch[:, decoding], kv_lens[decoding] - 1)
    fused = tiling.fused is not None and decoding.any() and not decoding.all()
    busy = tiling.fused if fused else tiling.busy
    if busy is None:
        part_pages = tiling.decode_pages(limits.page_size)
        num_parts = -(-decodes[:, 5] // part_pages) - decodes[:, 4] // part_pages
        if num_parts.sum() > limits.max_decode_items:  # only where sequences share pages
            fitting = np.cumsum(num_parts) <= limits.max_decode_items
            decodes, num_parts = decodes[fitting], num_parts[fitting]
            decoding[np.flatnonzero(decoding)[~fitting]] = False
        decode, combine = _cut(decodes, num_parts, part_pages, keep_whole=False)
        prefill, _ = _cut(_tiles(limits, batch[:, ~decoding]), None)
    else:
        used = int(query_lens.sum())
        padding = np.array([[0], [used], [limits.num_rows - used], [0]])
        tiles = _tiles(limits, np.concatenate((batch[:, ~decoding], padding), axis=1))
        decode_wave, prefill_wave = busy.decode / busy.kv_heads, busy.prefill / busy.kv_heads
        decode_parts = _num_parts(limits, decodes, decode_wave, busy.decode_parts, DECODE_COST)
        prefill_parts = _num_parts(limits, tiles, prefill_wave, busy.prefill_parts, PREFILL_COST)
        decode, combine = _cut(decodes, decode_parts, keep_whole=False)
        prefill, more = _cut(tiles, prefill_parts)
        more[:, 2] += limits.max_decode_items
        combine = np.concatenate((combine, more))
        decode, prefill = _longest_first(decode), _longest_first(prefill)
    for target, found in ((out.decode, decode), (out.prefill, prefill), (out.combine, combine)):
        target[: len(found)] = found
    out.counts[:3] = len(decode), len(prefill), len(combine)
    if fused:
        out.counts[3:], out.counts[:2] = out.counts[:2], 0


def new_plan(limits: PlanLimits) -> AttentionPlan[np.ndarray]:
    """Arrays of a plan's own, as ``empty_plan`` leaves them."""
    plan = AttentionPlan(**{name: np.zeros(shape, np.int32) for name, shape in plan_shapes(limits).items()})
    empty_plan(limits, plan)
    return plan


def empty_plan(limits: PlanLimits, out: AttentionPlan[np.ndarray]) -> None:
    """Make ``out``, all zeros, the plan of a batch without sequences."""
    out.combine[:, 0] = limits.num_rows


def expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 1, 3]: owners [0, 0, 1, 2, 2, 2] and ordinals [0, 1, 0, 0, 1, 2]."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _tiles(limits: PlanLimits, chunks: np.ndarray) -> np.ndarray:
    """Chunks ``[4, n]``, of sequence, first row, number of rows, KV length -> tiles of their rows."""
    tile_rows = limits.tile_rows
    owner, tile = expand(-(-chunks[2] // tile_rows))
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


def _num_parts(
    limits: PlanLimits, tiles: np.ndarray, wave: float, most_parts: int, cost: ItemCost
) -> np.ndarray | None:
    """How many parts each tile is cut into, so that a device that has ``wave`` items at once, and begins the longest
    first, is done as early as possible; None where none is cut. Those that are have at most ``most_parts`` together.

    Either all tiles are cut at about one length, or only those that follow the last full wave of whole tiles, as in
    Stream-K's hybrids (arXiv 2301.03598); into parts that fill one wave, or two, and so on. A tile costs its pages and
    a constant for each part, whatever its number of rows: kernels multiply whole tiles.
    """
    tile_pages = _pages(tiles)
    longest_first = np.argsort(-tile_pages)[: np.count_nonzero(tile_pages)]
    pages, num_tiles = tile_pages[longest_first].astype(float), len(longest_first)
    if num_tiles == 0:
        return None
    page_size = limits.page_size
    item_pages, part_pages = cost.item / page_size, (cost.item + cost.part) / page_size
    full_waves = int(num_tiles / wave)
    kept = int(full_waves * wave)
    work, kept_work, longest = float(pages.sum()), float(pages[:kept].sum()), float(pages[0])
    shared = (work + item_pages * num_tiles) / wave
    last_wave = (work - kept_work) / (num_tiles - kept) + item_pages if kept < num_tiles else 0.0
    whole = max(shared, longest + item_pages, (kept_work + item_pages * kept) / wave + last_wave)
    if shared >= GOOD_BALANCE * whole:
        return None

    # Each row is a way to cut the tiles that follow the first ones, which are kept whole.
    waves = range(max(full_waves, 1), max(full_waves, 1) + MOST_WAVES)
    first = 0 if kept == num_tiles or longest + item_pages > shared else kept
    rest_work = work - kept_work if first else work
    density = [(int(w * wave) - first) * pages[first] // rest_work / pages[first] for w in waves]
    num_parts = np.ceil(pages * np.array(density)[:, None] - UNCUT_EXCESS)
    np.minimum(num_parts, pages // limits.tiling.decode_pages(page_size), out=num_parts)
    np.maximum(num_parts, 1.0, out=num_parts)
    num_parts[:, :first] = 1.0
    best, least = None, LEAST_GAIN * whole
    longest_parts = (pages / num_parts).max(axis=1)
    counts = np.array((num_parts.sum(axis=1), (num_parts == 1.0).sum(axis=1), longest_parts)).T.tolist()
    for row, (num_items, num_whole, longest) in zip(num_parts, counts, strict=True):
        rest = num_items - first
        last_waves = math.ceil(rest / wave) * (rest_work / rest + part_pages)
        span = max(longest + part_pages, (work - rest_work + item_pages * first) / wave + last_waves)
        if span < least and num_items - num_whole <= most_parts:
            best, least = row, span
    if best is None:
        return None
    found = np.ones(len(tiles), int)
    found[longest_first] = best
    return found


def _cut(
    tiles: np.ndarray, num_parts: np.ndarray | None, part_pages: int | None = None, *, keep_whole: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Work items, and what to combine; without ``num_parts`` all tiles are whole.

    Parts are equal, or end at multiples of ``part_pages``. ``keep_whole``: a tile in one part has no partial result.
    """
    if num_parts is None:
        if keep_whole:
            return tiles, np.empty((0, COMBINE_FIELDS), int)
        num_rows = tiles[:, 2]
        tiles[:, 7] = partial = np.cumsum(num_rows) - num_rows
        return tiles, np.array((tiles[:, 1], num_rows, partial, np.ones(len(tiles), int))).T
    num_rows, split = tiles[:, 2], (num_parts > 1) | (not keep_whole)
    partial_rows = num_rows * num_parts * split
    partial = np.cumsum(partial_rows) - partial_rows
    owner, part = expand(num_parts)
    items, pages, parts = tiles[owner], _pages(tiles)[owner], num_parts[owner]
    begin = items[:, 4].copy()
    if part_pages is None:
        items[:, 4] = begin + pages * part // parts
        items[:, 5] = begin + pages * (part + 1) // parts
    else:
        start = (begin // part_pages + part) * part_pages
        items[:, 4] = np.maximum(begin, start)
        items[:, 5] = np.minimum(items[:, 5], start + part_pages)
    items[:, 7] = np.where(split[owner], partial[owner] + part * num_rows[owner], -1)
    return items, np.array((tiles[split, 1], num_rows[split], partial[split], num_parts[split])).T


def _longest_first(items: np.ndarray) -> np.ndarray:
    """A processor that is free takes the next item, so long ones must not come last."""
    return items[np.argsort(-_pages(items), kind="stable")]
