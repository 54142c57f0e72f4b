"""Prefill on Hopper GPUs, in jax's interpreter of them against a dense float64 reference, and compiled for them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels.backend import Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.mosaic_attention import Mosaic
from jaxserve.kernels.mosaic_prefill import MASKED, PAGE_SIZE, paged_prefill
from jaxserve.kernels.plan import AttentionPlan, BusyPrograms, PlanLimits, Tiling, make_plan, new_plan
from jaxserve.kernels.reach import Reach
from tests import gpu_packages
from tests.kernels.mosaic_interpreter import interpreted
from tests.kernels.ragged import LAYER, LAYERS, POISON, Masking, dense_attention, inputs_for

NUM_ROWS, MAX_SEQS, MAX_LEN = 64, 4, 320
PAGES_PER_SEQ = MAX_LEN // PAGE_SIZE
NUM_PAGES = 1 + MAX_SEQS * PAGES_PER_SEQ
HOPPER = Target("gpu", 90, 132)
BOUND = {"bfloat16": 3e-2, "float16": 4e-3}
PLAIN = Masking()


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for."""

    dim: int
    kv_heads: int
    group: int
    dtype: str
    masking: Masking = PLAIN

    @property
    def tiling(self) -> Tiling:
        return Tiling(decode_tokens=64, prefill_rows=128 // self.group, busy=BusyPrograms(decode=2, prefill=9))


CASES = [
    Case(128, 2, 4, "bfloat16"),
    Case(64, 1, 1, "float16", Masking(window=70, plan_window=70)),
    Case(64, 2, 8, "bfloat16", Masking(softcap=2.0)),
    Case(128, 1, 3, "float16", Masking(window=40, softcap=30.0, plan_window=200)),
    Case(64, 1, 5, "float16", Masking(window=100)),
    Case(64, 1, 8, "bfloat16", Masking(window=128, sinks=(2.0, 2.0))),
    Case(128, 1, 5, "float16", Masking(chunk=100)),
]


@functools.cache
def kernel(case: Case) -> Any:
    masking = case.masking
    return jax.jit(
        functools.partial(
            paged_prefill,
            scale=case.dim**-0.5,
            reach=Reach(masking.window, masking.chunk),
            softcap=masking.softcap,
        )
    )


@dataclass(frozen=True)
class Batch:
    """One step's batch, what the kernel made of it, and what is right."""

    plan: AttentionPlan[np.ndarray]
    out: np.ndarray
    values: np.ndarray
    stats: np.ndarray
    expected: np.ndarray
    sinks: np.ndarray | None

    @property
    def items(self) -> np.ndarray:
        return self.plan.prefill[: self.plan.counts[1]]

    def check(self, bound: float) -> None:
        """The rows of prefill items are right, and no others are written."""
        written, part_rows = np.zeros(len(self.out), bool), np.zeros(len(self.values), bool)
        for row, num_rows, partial in self.items[:, [1, 2, 7]]:
            target, first = (written, row) if partial < 0 else (part_rows, partial)
            assert not target[first : first + num_rows].any()
            target[first : first + num_rows] = True
        assert np.isnan(self.out[~written]).all()
        assert np.isnan(self.values[~part_rows]).all()
        assert np.isnan(self.stats[~part_rows]).all()
        got = self.out.copy()
        for row, num_rows, first, parts in self.plan.combine[: self.plan.counts[2]]:
            first -= len(self.plan.decode)  # before which are decodes'
            if first < 0:
                continue
            span = slice(first, first + num_rows * parts)
            values, stats = (a[span].reshape(parts, num_rows, *a.shape[1:]) for a in (self.values, self.stats))
            top, total = stats[..., 0], stats[..., 1]
            weight = np.exp2(top - top.max(axis=0))
            totals = (weight * total).sum(axis=0)
            if self.sinks is not None:
                totals += np.exp2(self.sinks / np.log(2) - top.max(axis=0))
            got[row : row + num_rows] = (weight[..., None] * values).sum(axis=0) / totals[..., None]
            written[row : row + num_rows] = True
        assert np.abs(got[written] - self.expected[written]).max() < bound


def run(case: Case, sequences: list[tuple[int, int]], seed: int) -> Batch:
    """A batch of (context, query length) sequences."""
    rng = np.random.default_rng(seed)
    dtype, masking = jnp.dtype(case.dtype), case.masking
    limits = PlanLimits(NUM_ROWS, MAX_SEQS, MAX_LEN, PAGE_SIZE, NUM_PAGES, case.tiling, masking.plan_window)
    q = rng.normal(size=(NUM_ROWS, case.kv_heads * case.group, case.dim))
    q = np.asarray(jnp.asarray(q, dtype), np.float32)
    sinks = masking.draw_sinks(rng, q.shape[1])
    # Poisoned: what nobody wrote must weigh nothing.
    cache = np.full((2, LAYERS * NUM_PAGES, PAGE_SIZE, case.kv_heads, case.dim), POISON, np.float32)
    tables = np.zeros((MAX_SEQS, PAGES_PER_SEQ), np.int32)
    free = list(rng.permutation(np.arange(1, NUM_PAGES)))
    slots = rng.permutation(MAX_SEQS)[: len(sequences)]
    row, expected = 0, np.zeros(q.shape)
    for slot, (context, length) in zip(slots, sequences, strict=True):
        total = context + length
        pages = np.array([free.pop() for _ in range(-(-total // PAGE_SIZE))])
        tables[slot, : len(pages)] = pages
        history = rng.normal(size=(2, total, case.kv_heads, case.dim))
        history = np.asarray(jnp.asarray(history, dtype), np.float32)
        positions = np.arange(total)
        cache[:, LAYER * NUM_PAGES + pages[positions // PAGE_SIZE], positions % PAGE_SIZE] = history
        rows = slice(row, row + length)
        expected[rows] = dense_attention(
            q[rows], *history, case.dim**-0.5, masking.window, masking.softcap, masking.chunk, sinks
        )
        if masking.plan_window is not None:  # pages out of the widest window are freed
            tables[slot, : max(context - masking.plan_window + 1, 0) // PAGE_SIZE] = 0
        row += length
    plan = new_plan(limits)
    contexts, lengths = np.array(sequences).T
    make_plan(limits, slots, lengths, contexts + lengths, plan)
    inputs = inputs_for(limits, Mosaic(case.tiling, HOPPER), tables=tables, plan=plan)
    pages = KVCache(*jnp.asarray(cache, dtype), jnp.ones((LAYERS, 2)))
    with interpreted():
        found = kernel(case)(jnp.asarray(q, dtype), pages, inputs, jnp.int32(LAYER), sinks)
        results = [np.asarray(array, np.float32) for array in found]
    assert found[0].dtype == dtype
    return Batch(plan, *results, expected, sinks)


CHUNK = st.tuples(st.integers(0, 250), st.integers(2, 20))
DECODE = st.tuples(st.integers(0, 250), st.just(1))


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=2, deadline=None)
@given(st.lists(st.one_of(CHUNK, CHUNK, DECODE), min_size=1, max_size=3), st.integers(0, 999))
def test_any_mix_of_chunks(case: Case, sequences: list[tuple[int, int]], seed: int) -> None:
    run(case, sequences, seed).check(BOUND[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_contexts_are_split_and_padding_is_zero(case: Case) -> None:
    batch = run(case, [(250, 40), (0, 9), (100, 1)], seed=1)
    batch.check(BOUND[case.dtype])
    assert (batch.items[:, 7] >= 0).any()
    (padding,) = batch.items[batch.items[:, 5] == 0][:, 1:3][:1]
    assert padding.sum() <= NUM_ROWS
    assert not batch.out[50:].any()


def test_parts_before_the_window_are_empty() -> None:
    """In a layer whose window is narrower than the plan's."""
    batch = run(CASES[3], [(250, 6)], seed=2)
    first = batch.items[(batch.items[:, 4] == 0) & (batch.items[:, 5] > 0)]
    assert len(first) == 1
    num_rows, partial = first[0, [2, 7]]
    assert partial >= 0
    rows = slice(partial, partial + num_rows)
    assert (batch.stats[rows, :, 0] == np.float32(MASKED)).all()
    assert (batch.stats[rows, :, 1] == 0).all()
    assert (batch.values[rows] == 0).all()


def test_tiles_of_more_rows_than_the_warpgroups_have() -> None:
    tiling = Tiling(64, 33, BusyPrograms(1, 1))
    limits = PlanLimits(NUM_ROWS, 1, MAX_LEN, PAGE_SIZE, NUM_PAGES, tiling)
    pages = jnp.zeros((LAYERS * NUM_PAGES, PAGE_SIZE, 1, 64), jnp.bfloat16)
    inputs = inputs_for(limits, Mosaic(tiling, HOPPER))
    with pytest.raises(ValueError, match="tile_rows 33 times 4 query heads for each KV head must be at most 128"):
        paged_prefill(
            jnp.zeros((NUM_ROWS, 4, 64), jnp.bfloat16), KVCache(pages, pages, jnp.ones((LAYERS, 2))), inputs,
            jnp.int32(0), None, scale=1.0, reach=Reach(), softcap=None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """What each variant asks of a GPU, compiled in another process: this one's jax has only the CPU."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.kernels.mosaic_report", "--json"]
    environment = gpu_packages.environment()
    return json.loads(subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def test_registers_and_shared_memory_suffice(compiled: dict[str, dict[str, Any]]) -> None:
    for variant, found in compiled.items():
        assert found["spilled_bytes"] == 0, (variant, found)
