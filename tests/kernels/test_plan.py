"""The attention work list: what it covers, and that it never outgrows its arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels.backend import CPU_TILING
from jaxserve.kernels.plan import BusyItems, PlanLimits, Tiling, make_plan, new_plan
from tests.kernels.ragged import MAX_LEN

PAGE_SIZE, MAX_NUM_SEQS = 16, 8
tilings = st.one_of(
    st.just(CPU_TILING),
    st.builds(
        Tiling,
        st.integers(1, 300),
        st.integers(1, 40),
        st.builds(BusyItems, st.integers(1, 60), st.integers(1, 40)),
    ),
)
batches = st.lists(st.tuples(st.integers(0, 600), st.integers(1, 64)), min_size=1, max_size=MAX_NUM_SEQS)


@settings(max_examples=300, deadline=None)
@given(batches, tilings, st.one_of(st.none(), st.integers(1, 700)), st.integers(0, 50))
def test_every_row_sees_each_visible_page_once(
    sequences: list[tuple[int, int]], tiling: Tiling, window: int | None, padding: int
) -> None:
    """Also in batches of more work than the device likes: parts grow, and nothing is left out."""
    context, lengths = np.array(sequences).T
    used = int(lengths.sum())

    def first_page(position: int) -> int:
        return 0 if window is None else max(0, position - window + 1) // PAGE_SIZE

    pages_held = [-(-(c + n) // PAGE_SIZE) - first_page(c) for c, n in sequences]
    limits = PlanLimits(used + padding, MAX_NUM_SEQS, MAX_LEN, PAGE_SIZE, 1 + sum(pages_held), tiling, window)
    plan = new_plan(limits)
    make_plan(limits, np.arange(len(sequences)), lengths, context + lengths, plan)
    sequence_of = np.repeat(np.arange(len(sequences)), lengths)
    position_of = np.concatenate([np.arange(c, c + n) for c, n in sequences])
    seen: dict[int, list[int]] = {row: [] for row in range(limits.num_rows)}
    writers = dict.fromkeys(seen, 0)
    results: dict[int, int] = {}
    for kind, items in enumerate((plan.decode[: plan.counts[0]], plan.prefill[: plan.counts[1]])):
        for sequence, row, num_rows, position, first, end, kv_len, partial in items.tolist():
            assert num_rows == 1 if kind == 0 else num_rows <= limits.tile_rows
            for i in range(num_rows):
                writers[row + i] += partial < 0
                seen[row + i] += range(first, end)
                if row + i < used:
                    assert (sequence, position + i) == (sequence_of[row + i], position_of[row + i])
                    assert kv_len == context[sequence] + lengths[sequence]
                    assert (kind == 0) == (lengths[sequence] == 1)
                if partial >= 0:
                    assert results.setdefault(partial + i, row + i) == row + i
    assert max(results, default=-1) < limits.max_partial_rows
    for row, num_rows, first, parts in plan.combine[: plan.counts[2]].tolist():
        for i in range(num_rows):
            writers[row + i] += 1
            assert [results.pop(first + part * num_rows + i) for part in range(parts)] == [row + i] * parts
    assert not results, "every partial result is combined once"
    assert (plan.combine[plan.counts[2] :, 0] == limits.num_rows).all()
    for row in range(used):
        # A tile's pages are those of its first and its last row.
        assert len(set(seen[row])) == len(seen[row])
        assert set(seen[row]) >= set(range(first_page(position_of[row]), position_of[row] // PAGE_SIZE + 1))
        assert writers[row] == 1
    for row in range(used, limits.num_rows):
        assert not seen[row]
        assert writers[row] == (tiling.busy is not None), "written as zeros where the kernel does not clear the output"


@given(batches, st.integers(1, 400), st.integers(1, 40))
def test_a_device_gets_about_as_many_parts_as_keep_it_busy(
    sequences: list[tuple[int, int]], decode_tokens: int, busy: int
) -> None:
    """The longest part is at most half as long again as the longest that was meant; the longest come first."""
    context, lengths = np.array(sequences).T
    tiling = Tiling(decode_tokens, 16, BusyItems(busy, busy))
    limits = PlanLimits(int(lengths.sum()), MAX_NUM_SEQS, MAX_LEN, PAGE_SIZE, 10**6, tiling)
    plan = new_plan(limits)
    make_plan(limits, np.arange(len(sequences)), lengths, context + lengths, plan)
    for items in (plan.decode[: plan.counts[0]], plan.prefill[: plan.counts[1]]):
        pages = items[:, 5] - items[:, 4]
        meant = max(decode_tokens // PAGE_SIZE, 1, pages.sum() / busy)
        assert pages.max(initial=0) <= np.ceil(1.5 * meant)
        assert (np.diff(pages) <= 0).all()


@pytest.mark.parametrize("page_size", [1, 16, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 2, 128, 129, 130, 257, 258, 600])
def test_the_longest_decode_work_list_is_as_long_as_the_plan_says(window: int | None, page_size: int) -> None:
    limits = PlanLimits(1, 1, MAX_LEN, page_size, 10**6, CPU_TILING, window)
    one = np.ones(1, int)
    counts = []
    for length in range(1, MAX_LEN + 1):
        plan = new_plan(limits)
        make_plan(limits, one - 1, one, one * length, plan)
        counts.append(plan.counts[0])
    assert max(counts) == limits.max_decode_items
