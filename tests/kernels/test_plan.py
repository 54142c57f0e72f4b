"""The attention work list: what it covers, and that it never outgrows its arrays."""

from __future__ import annotations

import heapq

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels.backend import CPU_TILING, AttentionShape, Target
from jaxserve.kernels.plan import AttentionPlan, BusyPrograms, PlanLimits, Tiling, make_plan, new_plan
from jaxserve.kernels.registry import choose_backend
from tests.kernels.ragged import MAX_LEN

PAGE_SIZE, MAX_NUM_SEQS = 16, 8
busy_programs = st.builds(BusyPrograms, st.integers(1, 60), st.integers(1, 40), st.integers(1, 9))
tilings = st.one_of(
    st.just(CPU_TILING),
    st.builds(Tiling, st.integers(1, 300), st.integers(1, 40), busy_programs, st.one_of(st.none(), busy_programs)),
)
decode, chunk = (st.tuples(st.integers(0, 600), rows) for rows in (st.just(1), st.integers(1, 64)))
batches = st.lists(st.one_of(decode, decode, chunk), min_size=1, max_size=MAX_NUM_SEQS)
forks = st.lists(
    st.tuples(st.integers(0, MAX_NUM_SEQS - 1), st.integers(0, 42) | st.just(42)),
    min_size=MAX_NUM_SEQS,
    max_size=MAX_NUM_SEQS,
)
"""Of each sequence: from which one, counted among those before it, it has how many pages."""


def tables_of(num_held: list[int], forks: list[tuple[int, int]]) -> list[list[int]]:
    """The pages of each sequence. A forked one begins with pages of another's, as far as both have so many."""
    tables: list[list[int]] = []
    for i, (held, (other, num_shared)) in enumerate(zip(num_held, forks, strict=False)):
        shared = tables[other % i][: min(num_shared, held)] if i else []
        tables.append(shared + [1000 * (1 + i) + j for j in range(held - len(shared))])
    return tables


def plan_of(limits: PlanLimits, sequences: list[tuple[int, int]]) -> AttentionPlan[np.ndarray]:
    """Of (context, query length) of each sequence."""
    context, lengths = np.array(sequences).T
    plan = new_plan(limits)
    make_plan(limits, np.arange(len(sequences)), lengths, context + lengths, plan)
    return plan


def items_of(plan: AttentionPlan[np.ndarray], kind: int) -> np.ndarray:
    """Whichever launch takes them."""
    return plan[kind][: plan.counts[kind] + (plan.counts[3 + kind] if len(plan.counts) > 3 else 0)]


@settings(max_examples=300, deadline=None)
@given(batches, tilings, st.one_of(st.none(), st.integers(1, 700)), st.integers(0, 50), forks)
def test_every_row_sees_each_visible_page_once(
    sequences: list[tuple[int, int]],
    tiling: Tiling,
    window: int | None,
    padding: int,
    forks: list[tuple[int, int]],
) -> None:
    """Also in batches of more work than the device likes, and where sequences share pages, so that the cache has fewer
    than they see: nothing is left out, and nothing outgrows its array."""
    context, lengths = np.array(sequences).T
    used = int(lengths.sum())

    def first_page(position: int) -> int:
        return 0 if window is None else max(0, position - window + 1) // PAGE_SIZE

    num_held = [-(-(c + n) // PAGE_SIZE) for c, n in sequences]
    tables = tables_of(num_held, forks)
    held = [page for table, (c, _) in zip(tables, sequences, strict=True) for page in table[first_page(c) :]]
    num_pages, shared = 1 + len(set(held)), len(set(held)) < len(held)
    limits = PlanLimits(used + padding, MAX_NUM_SEQS, MAX_LEN, PAGE_SIZE, num_pages, tiling, window)
    plan = plan_of(limits, sequences)
    sequence_of = np.repeat(np.arange(len(sequences)), lengths)
    position_of = np.concatenate([np.arange(c, c + n) for c, n in sequences])
    seen: dict[int, list[int]] = {row: [] for row in range(limits.num_rows)}
    writers = dict.fromkeys(seen, 0)
    results: dict[int, int] = {}
    first_partials = 0, limits.max_decode_items
    for kind, items in enumerate((items_of(plan, 0), items_of(plan, 1))):
        for sequence, row, num_rows, position, first, end, kv_len, partial in items.tolist():
            assert num_rows == 1 if kind == 0 else num_rows <= limits.tile_rows
            for i in range(num_rows):
                writers[row + i] += partial < 0
                seen[row + i] += range(first, end)
                if row + i < used:
                    assert (sequence, position + i) == (sequence_of[row + i], position_of[row + i])
                    assert kv_len == context[sequence] + lengths[sequence]
                    assert kind == 1 or lengths[sequence] == 1
                    assert kind == 0 or lengths[sequence] > 1 or (tiling.busy is None and shared)
                if partial >= 0:
                    assert results.setdefault(first_partials[kind] + partial + i, row + i) == row + i
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


@given(batches)
def test_hybrid_batches_have_one_launch_where_there_is_one(sequences: list[tuple[int, int]]) -> None:
    tiling = Tiling(16, 8, BusyPrograms(6, 3), fused=BusyPrograms(4, 2))
    limits = PlanLimits(sum(n for _, n in sequences), MAX_NUM_SEQS, MAX_LEN, PAGE_SIZE, 10**6, tiling)
    counts = plan_of(limits, sequences).counts
    hybrid = len({n == 1 for _, n in sequences}) == 2
    assert (counts[3:] > 0).tolist() == [hybrid] * 2
    assert (counts[:2] > 0).any() != hybrid


@given(batches, st.integers(1, 400), st.integers(1, 40), st.integers(1, 4))
def test_the_longest_items_come_first(
    sequences: list[tuple[int, int]], decode_tokens: int, programs: int, kv_heads: int
) -> None:
    """And no part is shorter than allowed."""
    tiling = Tiling(decode_tokens, 16, BusyPrograms(programs, programs, kv_heads))
    limits = PlanLimits(sum(n for _, n in sequences), MAX_NUM_SEQS, MAX_LEN, PAGE_SIZE, 10**6, tiling)
    plan = plan_of(limits, sequences)
    ends = np.cumsum([n for _, n in sequences])
    for items in (plan.decode[: plan.counts[0]], plan.prefill[: plan.counts[1]]):
        pages = items[:, 5] - items[:, 4]
        assert (np.diff(pages) <= 0).all()
        for (_, row, num_rows, position, *_), length in zip(items.tolist(), pages.tolist(), strict=True):
            whole = -(-(position + num_rows) // PAGE_SIZE) if row < ends[-1] else 0
            assert length >= min(whole, decode_tokens // PAGE_SIZE)


H100 = Target("gpu", 90, 132)
MISTRAL = AttentionShape(32, 8, 128, 64, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
GPU_TILING = choose_backend("triton", H100, MISTRAL).tiling
ITEM_PAGES = 1.0, 1.5
"""What a decode item and a prefill item cost besides their pages."""


def gpu_plan(sequences: list[tuple[int, int]]) -> AttentionPlan[np.ndarray]:
    """As Mistral-7B has it on an H100."""
    num_rows = sum(n for _, n in sequences)
    return plan_of(PlanLimits(num_rows, max(128, len(sequences)), 32768, 64, 4096, GPU_TILING), sequences)


def efficiency(plan: AttentionPlan[np.ndarray], kind: int) -> float:
    """Share of the time until all are done in which programs are busy. The lesser of two simulations: that whoever is
    done takes the next item of the list, and that programs take fixed ones, back and forth, as kernels do."""
    assert GPU_TILING.busy is not None
    programs, items = GPU_TILING.busy[kind], plan[kind][: plan.counts[kind]]
    pages = items[:, 5] - items[:, 4]
    jobs = np.repeat(pages[pages > 0] + ITEM_PAGES[kind], MISTRAL.num_kv_heads)
    first_free, fixed = [0.0] * programs, np.zeros(programs)
    for job in jobs:
        heapq.heapreplace(first_free, first_free[0] + job)
    for wave, first in enumerate(range(0, len(jobs), programs)):
        taken = jobs[first : first + programs]
        fixed[:: 1 if wave % 2 == 0 else -1][: len(taken)] += taken
    return jobs.sum() / programs / max(*first_free, fixed.max())


def test_chunks_keep_a_gpu_busy() -> None:
    found = [
        efficiency(gpu_plan([(kv_len - rows, rows)]), kind=1)
        for kv_len in (2048, 4096, 8192, 16384)
        for rows in range(32, 2049, 32)
    ]
    assert np.mean(found) >= 0.95
    assert min(found) >= 0.75


def test_decodes_keep_a_gpu_busy() -> None:
    """Where there is enough to do for all to take at least four parts of the least length."""
    random = np.random.default_rng(0)
    least = 4 * 132 * 3 // 8 * GPU_TILING.decode_tokens
    same = [[(tokens - 1, 1)] * n for tokens in (512, 1024, 2048, 4096, 8192) for n in range(1, 129)]
    unlike = [[(int(tokens), 1) for tokens in random.integers(100, 8000, n)] for n in range(8, 129, 8)]
    one_long = [[(32767, 1)] + [(999, 1)] * n for n in range(8, 128, 8)]
    found = [
        efficiency(gpu_plan(batch), kind=0)
        for batch in same + unlike + one_long
        if sum(context for context, _ in batch) >= least
    ]
    assert np.mean(found) >= 0.93
    assert min(found) >= 0.65


@pytest.mark.parametrize(
    ("sequences", "kind"),
    [([(32767, 1)], 0), ([(4095, 1)] * 8, 0), ([(7680, 512)], 1), ([(8160, 32)], 1)],
    ids=["1x32k", "8x4k", "512@8k", "32@8k"],
)
def test_a_wave_is_not_overshot(sequences: list[tuple[int, int]], kind: int) -> None:
    """One item too many would take as long again as all others."""
    assert GPU_TILING.busy is not None
    jobs = gpu_plan(sequences).counts[kind] * MISTRAL.num_kv_heads
    assert 0.95 * GPU_TILING.busy[kind] < jobs <= GPU_TILING.busy[kind]


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
