"""Prefill attention for Hopper GPUs, in Pallas Mosaic GPU.

A block of three warpgroups computes one prefill item for one KV head. One warpgroup only moves memory: it copies pages
into rings in shared memory with TMA, and results out. The other two multiply and weigh 64 rows each: a page's scores
and the product of the page before it with its values run on the matrix units while the softmax of that page is under
way, as in FlashAttention-3 (arXiv 2407.08608).

Row ``g * tile_rows + i`` of a tile is the ``g``-th head of the KV head's group, at the item's ``i``-th query: a head's
rows lie together both in the tile and, with a stride, in the batch, and one copy moves them. Rows past those are
never written, whatever they hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.plan import ITEM_FIELDS
from jaxserve.kernels.reach import Reach

type Ref = Any
"""Of Pallas, to global or shared memory or to a barrier."""

PAGE_SIZE = 64
WARPGROUP_ROWS = 64
"""Rows that one instruction of the matrix units multiplies."""
COMPUTE_WARPGROUPS = 2
MEMORY_WARPGROUP = COMPUTE_WARPGROUPS
TILE_ROWS = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
STAGES = 3
"""Pages of keys, and of values, that shared memory holds next to the tile."""
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
"""Of each thread; together all that a multiprocessor has."""
MASKED = -1e30
LOG2_E = math.log2(math.e)


def paged_prefill(
    q: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    layer: jax.Array,
    sinks: jax.Array | None,
    *,
    scale: float,
    reach: Reach,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of the rows in ``inputs.plan.prefill``; see kernels.attention.paged_attention.

    q: ``[T, heads, head_dim]``, in the type of the cache, whose pages hold 64 tokens; head_dim is 64 or 128.
    Returns the output, as ``q``, and the partial results of items that are parts of a tile: unnormalised values
    ``float32[n, heads, head_dim]`` and stats ``float32[n, heads, 2]`` for ``max_prefill_partials`` rows, the maximum of
    a row's scores times log2 e (-1e30 if it saw none) and the sum of its weights. Sinks are in the output, and in no
    partial result. All other rows are undefined. Raises ValueError if a tile's rows exceed 128. Soft caps use the
    hardware's tanh, whose relative error is 2^-11.
    """
    _, heads, dim = q.shape
    kv_heads, limits = cache.k.shape[2], inputs.limits
    group = heads // kv_heads
    if limits.tile_rows * group > TILE_ROWS:
        raise ValueError(
            f"tile_rows {limits.tile_rows} times {group} query heads for each KV head must be at most {TILE_ROWS}"
        )
    kernel = _Kernel(group, limits.tile_rows, limits.num_pages, scale, reach, softcap, has_sinks=sinks is not None)
    partial = (limits.max_prefill_partials, heads)
    return plgpu.kernel(
        kernel.body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*partial, dim), jnp.float32),
            jax.ShapeDtypeStruct((*partial, 2), jnp.float32),
        ),
        scratch_types={
            "keys": _Ring.types(dim, q.dtype),
            "values": _Ring.types(dim, q.dtype),
            "tile": _Tile(
                plgpu.SMEM((TILE_ROWS, dim), q.dtype),
                plgpu.SMEM((TILE_ROWS, dim), jnp.float32),
                plgpu.SMEM((2, TILE_ROWS), jnp.float32),
                plgpu.Barrier(num_arrivals=group),
                plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            ),
        },
        # Blocks start in the order of heads, then items: longest items first, and those that are not real last.
        grid=(kv_heads, inputs.plan.prefill.shape[0]),
        grid_names=("head", "item"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )(
        q, cache.k, cache.v, inputs.block_tables, inputs.plan.prefill, inputs.plan.counts,
        jnp.asarray(layer, jnp.int32).reshape(1), kernel.tops_of(sinks, kv_heads),
    )  # fmt: skip


class _Ring(NamedTuple):
    """Pages of keys, or of values, in shared memory; the item's ``j``-th is in slot ``j % STAGES``."""

    pages: Ref
    """``[STAGES, PAGE_SIZE, head_dim]``"""
    full: Ref
    """A barrier for each slot: the page has arrived."""
    free: Ref
    """The same: both warpgroups have read it. Nobody arrives for the last ``STAGES`` pages, which no other follows."""

    @classmethod
    def types(cls, dim: int, dtype: jnp.dtype) -> _Ring:
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
        return cls(
            plgpu.SMEM((STAGES, PAGE_SIZE, dim), dtype, transforms=transforms),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=STAGES),
        )


class _Tile(NamedTuple):
    """What passes between the warpgroups besides pages."""

    rows: Ref
    """``[TILE_ROWS, head_dim]``: the queries, later the output."""
    values: Ref
    """``float32[TILE_ROWS, head_dim]``: the unnormalised output of a part."""
    stats: Ref
    """``float32[2, TILE_ROWS]``: a part's maxima and sums."""
    full: Ref
    """The queries have arrived, a head at a time."""
    done: Ref
    """Both warpgroups have written their results."""


class _Memory(NamedTuple):
    """The kernel's operands and results, in global memory."""

    q: Ref
    k: Ref
    v: Ref
    tables: Ref
    items: Ref
    counts: Ref
    layer: Ref
    sinks: Ref
    """``float32[kv_heads, TILE_ROWS]``, read if there are sinks: that of the row's head, in the unit of scores."""
    out: Ref
    values: Ref
    stats: Ref


class _Item(NamedTuple):
    """A work item, in int32 scalars. One without pages has a single page that its positions do not see."""

    sequence: jax.Array
    row: jax.Array
    num_rows: jax.Array
    position: jax.Array
    first_page: jax.Array
    num_pages: jax.Array
    partial: jax.Array


class _State(NamedTuple):
    """One warpgroup's online softmax after a page, whose weights are not multiplied with its values yet."""

    value: jax.Array
    """``float32[WARPGROUP_ROWS, head_dim]``: the pages before, to be scaled by ``rescale``."""
    rescale: jax.Array
    top: jax.Array
    """``float32[WARPGROUP_ROWS]``, as ``rescale``: the largest score."""
    total: jax.Array
    """The same: the sum of weights."""
    weights: jax.Array
    """``[WARPGROUP_ROWS, PAGE_SIZE]``, in the type of the values."""


@dataclass(frozen=True)
class _Kernel:
    """The kernel, and what is known when it is compiled."""

    group: int
    """Query heads of a KV head."""
    tile_rows: int
    """Most queries of an item."""
    num_pages: int
    """Of a layer."""
    scale: float
    reach: Reach
    softcap: float | None
    has_sinks: bool

    def tops_of(self, sinks: jax.Array | None, kv_heads: int) -> jax.Array:
        """``_Memory.sinks`` from ``float32[heads]``."""
        if sinks is None:
            return jnp.zeros((1, 1), jnp.float32)
        rows = jnp.repeat(sinks.reshape(kv_heads, self.group) * (LOG2_E / self._unit), self.tile_rows, axis=1)
        return jnp.pad(rows, ((0, 0), (0, TILE_ROWS - rows.shape[1])))

    def body(self, *memory: Ref, keys: _Ring, values: _Ring, tile: _Tile) -> None:
        refs = _Memory(*memory)
        warpgroup, number = lax.axis_index("warpgroup"), lax.axis_index("item")

        @pl.when(number < refs.counts[1])
        def _() -> None:
            item = self._item(refs.items, number)

            @pl.when(warpgroup == MEMORY_WARPGROUP)
            def _() -> None:
                plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
                self._load(item, refs, keys, values, tile)
                self._store(item, refs, tile)

            @pl.when(warpgroup < COMPUTE_WARPGROUPS)
            def _() -> None:
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                self._compute(item, warpgroup, refs, keys, values, tile)

    def _item(self, items: Ref, number: jax.Array) -> _Item:
        fields = [items[number, field] for field in range(ITEM_FIELDS)]
        sequence, row, num_rows, position, first_page, end_page, _, partial = fields
        if self.reach.is_bounded:  # the plan's window may be wider
            seen = jnp.maximum(self.reach.first_key(position), 0)
            first_page = jnp.maximum(first_page, lax.div(seen, jnp.int32(PAGE_SIZE)))
        first_page = jnp.minimum(first_page, jnp.maximum(end_page - 1, 0))
        position = jnp.where(end_page > 0, position, -TILE_ROWS)
        num_pages = jnp.maximum(end_page - first_page, 1)
        return _Item(sequence, row, num_rows, position, first_page, num_pages, partial)

    def _load(self, item: _Item, refs: _Memory, keys: _Ring, values: _Ring, tile: _Tile) -> None:
        head = lax.axis_index("head")

        @pl.loop(0, self.group)
        def _(g: jax.Array) -> None:
            source = refs.q.at[pl.ds(item.row, self.tile_rows), head * self.group + g]
            plgpu.copy_gmem_to_smem(source, tile.rows.at[pl.ds(g * self.tile_rows, self.tile_rows)], tile.full)

        def fill(ring: _Ring, j: jax.Array, source: Ref) -> None:
            slot = _slot(j)

            @pl.when(j >= STAGES)
            def _() -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            plgpu.copy_gmem_to_smem(source, ring.pages.at[slot], ring.full.at[slot])

        layer_pages = refs.layer[0] * self.num_pages

        @pl.loop(0, item.num_pages)
        def _(j: jax.Array) -> None:
            page = layer_pages + refs.tables[item.sequence, item.first_page + j]
            fill(keys, j, refs.k.at[page, :, head])
            fill(values, j, refs.v.at[page, :, head])

    def _compute(
        self, item: _Item, warpgroup: jax.Array, refs: _Memory, keys: _Ring, values: _Ring, tile: _Tile
    ) -> None:
        rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        plgpu.barrier_wait(tile.full)
        queries = plgpu.load(tile.rows.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        positions = item.position + lax.rem(row + warpgroup * WARPGROUP_ROWS, jnp.full_like(row, self.tile_rows))
        dim = tile.rows.shape[1]

        def score(accumulator: Ref, j: jax.Array) -> None:
            plgpu.barrier_wait(keys.full.at[_slot(j)])
            plgpu.wgmma(accumulator, queries, keys.pages.at[_slot(j)].transpose((1, 0)))

        def scored(accumulator: Ref, j: jax.Array, *, in_flight: int) -> jax.Array:
            scores = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
            plgpu.barrier_arrive(keys.free.at[_slot(j)], predicate=j + STAGES < item.num_pages)
            return scores

        def multiply(accumulator: Ref, j: jax.Array, weights: jax.Array) -> None:
            plgpu.barrier_wait(values.full.at[_slot(j)])
            plgpu.wgmma(accumulator, weights, values.pages.at[_slot(j)])

        def multiplied(accumulator: Ref, j: jax.Array, state: _State) -> jax.Array:
            product = plgpu.wgmma_accumulator_load(accumulator)
            plgpu.barrier_arrive(values.free.at[_slot(j)], predicate=j + STAGES < item.num_pages)
            return state.value * _across(state.rescale, dim) + product

        def first(scores: Ref) -> _State:
            j = jnp.int32(0)
            score(scores, j)
            before = self._seen_before(item, refs, rows)
            top, total, weights, rescale = self._softmax(scored(scores, j, in_flight=0), item, j, positions, *before)
            value = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)
            return _State(value, rescale, top, total, weights.astype(queries.dtype))

        def step(j: jax.Array, state: _State) -> _State:
            def overlapped(scores: Ref, product: Ref) -> _State:
                score(scores, j)
                multiply(product, j - 1, state.weights)
                top, total, weights, rescale = lax.optimization_barrier(  # before the product is awaited
                    self._softmax(scored(scores, j, in_flight=1), item, j, positions, state.top, state.total)
                )
                value = multiplied(product, j - 1, state)
                return _State(value, rescale, top, total, weights.astype(queries.dtype))

            return pl.run_scoped(overlapped, _accumulator(PAGE_SIZE), _accumulator(dim))

        def last(product: Ref) -> jax.Array:
            multiply(product, item.num_pages - 1, state.weights)
            return multiplied(product, item.num_pages - 1, state)

        state = pl.run_scoped(first, _accumulator(PAGE_SIZE))
        state = lax.fori_loop(1, item.num_pages, step, state)
        value = pl.run_scoped(last, _accumulator(dim))

        @pl.when(item.partial < 0)
        def _() -> None:
            share = 1.0 / jnp.where(state.total > 0.0, state.total, 1.0)
            tile.rows[rows] = (value * _across(share, dim)).astype(queries.dtype)

        @pl.when(item.partial >= 0)
        def _() -> None:
            tile.values[rows] = value
            tile.stats[0, rows] = jnp.where(state.top == MASKED, MASKED, state.top * self._unit)
            tile.stats[1, rows] = state.total

        plgpu.commit_smem()
        plgpu.barrier_arrive(tile.done)

    @property
    def _unit(self) -> float:
        """What one unit of a score is in the exponent of 2."""
        return LOG2_E * (self.scale if self.softcap is None else self.softcap)

    def _softmax(
        self, scores: jax.Array, item: _Item, j: jax.Array, positions: jax.Array, top: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The item's ``j``-th page added: maximum, sum, the page's weights, and what to scale older ones by."""
        if self.softcap is not None:
            scores = jnp.tanh(scores * (self.scale / self.softcap))
        scores = self._mask(scores, item, (item.first_page + j) * PAGE_SIZE, positions)
        new_top = jnp.maximum(top, scores.max(axis=1))
        # Of a row that has seen nothing, all weights are to be 0.
        shift = jnp.where(new_top == MASKED, 0.0, new_top) * self._unit
        rescale = jnp.exp2(top * self._unit - shift)
        weights = jnp.exp2(scores * self._unit - _across(shift, PAGE_SIZE))
        return new_top, total * rescale + weights.sum(axis=1), weights, rescale

    def _seen_before(self, item: _Item, refs: _Memory, rows: Ref) -> tuple[jax.Array, jax.Array]:
        """Maximum and sum before the first page: a sink is a key of its own, which the combination of parts sees."""
        if not self.has_sinks:
            return _column(MASKED), _column(0.0)
        sink = plgpu.load(
            refs.sinks.at[lax.axis_index("head"), rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        is_whole = jnp.where(item.partial < 0, 1.0, 0.0)
        return sink * is_whole - (1.0 - is_whole) * -MASKED, _column(0.0) + is_whole

    def _mask(self, scores: jax.Array, item: _Item, first_key: jax.Array, positions: jax.Array) -> jax.Array:
        """Only pages at the edges of what the tile sees have masked keys."""

        def masked(scores: jax.Array) -> jax.Array:
            keys = first_key + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            visible = keys <= _across(positions, PAGE_SIZE)
            if self.reach.is_bounded:
                visible &= keys >= _across(self.reach.first_key(positions), PAGE_SIZE)
            return jnp.where(visible, scores, MASKED)

        edge = first_key + (PAGE_SIZE - 1) > item.position
        if self.reach.is_bounded:
            edge |= first_key < self.reach.first_key(item.position + item.num_rows - 1)
        return lax.cond(edge, masked, lambda scores: scores, scores)

    def _store(self, item: _Item, refs: _Memory, tile: _Tile) -> None:
        plgpu.barrier_wait(tile.done)

        @pl.when(item.partial < 0)
        def _() -> None:
            self._store_rows(tile.rows, refs.out, item.row, item.num_rows)

        @pl.when(item.partial >= 0)
        def _() -> None:
            self._store_rows(tile.values, refs.values, item.partial, item.num_rows)
            self._store_stats(tile.stats, refs.stats, item.partial, item.num_rows)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store_rows(self, rows: Ref, target: Ref, first_row: jax.Array, num_rows: jax.Array) -> None:
        """In blocks of 2^n rows, as copies have fixed sizes and the rows after these belong to others."""
        head = lax.axis_index("head")

        def block(size: int) -> None:
            @pl.when(num_rows & size != 0)
            def _() -> None:
                begin = num_rows & -(2 * size)

                @pl.loop(0, self.group)
                def _(g: jax.Array) -> None:
                    source = rows.at[pl.ds(g * self.tile_rows + begin, size)]
                    plgpu.copy_smem_to_gmem(source, target.at[pl.ds(first_row + begin, size), head * self.group + g])

        for bit in reversed(range(self.tile_rows.bit_length())):
            block(1 << bit)

    def _store_stats(self, stats: Ref, target: Ref, first_row: jax.Array, num_rows: jax.Array) -> None:
        """One number at a time, by all threads alike: a row's are too few bytes for an asynchronous copy, and jax 0.11
        cannot compile the same for a single warp."""
        head = lax.axis_index("head")

        # In one loop: with two, one inside the other, its few registers spill.
        @pl.loop(0, num_rows * self.group)
        def _(number: jax.Array) -> None:
            i, g = lax.div(number, jnp.int32(self.group)), lax.rem(number, jnp.int32(self.group))
            for kind in range(2):
                target[first_row + i, head * self.group + g, kind] = stats[kind, g * self.tile_rows + i]


def _slot(j: jax.Array) -> jax.Array:
    return lax.rem(j, jnp.int32(STAGES))


def _accumulator(columns: int) -> Any:
    return plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32)


def _column(value: float) -> jax.Array:
    return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _across(column: jax.Array, columns: int) -> jax.Array:
    """``[rows]`` -> ``[rows, columns]``"""
    return lax.broadcast_in_dim(column, (column.shape[0], columns), [0])
