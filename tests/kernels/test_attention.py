"""Paged attention against a dense float64 reference, on random ragged batches."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels import cpu
from jaxserve.kernels.attention import AttentionInputs, KVCache, paged_attention, write_kv
from jaxserve.kernels.plan import AttentionPlan, PlanLimits, make_plan, plan_shapes

LAYERS, LAYER = 2, 1
MAX_LEN = 700
POISON = 1e4
BACKENDS = ["xla", "native"] if cpu.available() else ["xla"]


@dataclass(frozen=True)
class Masking:
    """What is special about a layer's attention, and whether the plan knows of its window."""

    window: int | None = None
    softcap: float | None = None
    plan_window: int | None = None
    """The model's widest window; None also when other layers have none."""


def dense_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, window: int | None, softcap: float | None
) -> np.ndarray:
    """The last ``len(q)`` positions of one sequence attend causally: ``[n, H, D]``, ``[L, KV, D]``, in float64."""
    rows, heads, dim = q.shape
    length, kv_heads, _ = keys.shape
    out = np.zeros((rows, heads, dim))
    for row in range(rows):
        position = length - rows + row
        visible = np.arange(length) <= position
        if window is not None:
            visible &= np.arange(length) > position - window
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = keys[visible, kv].astype(np.float64) @ q[row, head].astype(np.float64) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[visible, kv].astype(np.float64) / weights.sum()
    return out


def run_batch(
    rng: np.random.Generator,
    sequences: list[tuple[int, int]],
    *,
    kv_heads: int,
    group: int,
    dim: int,
    page_size: int,
    num_rows: int,
    dtype: jnp.dtype = jnp.float32,
    backend: str = "xla",
    masking: Masking = Masking(),
) -> float:
    """Largest error over a batch of (context, query length) sequences whose earlier tokens are already cached."""
    heads, slots = kv_heads * group, len(sequences) + 2
    pages_per_seq = -(-MAX_LEN // page_size)
    num_pages = 1 + sum(-(-(c + n) // page_size) for c, n in sequences) + 3
    limits = PlanLimits(num_rows, slots, MAX_LEN, page_size, num_pages, masking.plan_window)
    free = list(rng.permutation(np.arange(1, num_pages)))
    slot_of = rng.permutation(slots)[: len(sequences)]
    tables = np.zeros((slots, pages_per_seq), np.int32)
    q = rng.normal(size=(num_rows, heads, dim)).astype(np.float32)
    k, v = rng.normal(size=(2, num_rows, kv_heads, dim)).astype(np.float32)
    kv_slots = np.zeros(num_rows, np.int32)
    # Poisoned: what nobody wrote must not be read.
    cache = np.full((2, LAYERS * num_pages, page_size, kv_heads, dim), POISON, np.float32)
    row, expected = 0, np.zeros((num_rows, heads, dim))
    for slot, (context, length) in zip(slot_of, sequences, strict=True):
        total = context + length
        pages = [free.pop() for _ in range(-(-total // page_size))]
        tables[slot, : len(pages)] = pages
        places = np.array(pages)[np.arange(total) // page_size] * page_size + np.arange(total) % page_size
        history = rng.normal(size=(2, context, kv_heads, dim)).astype(np.float32)
        flat = cache.reshape(2, -1, kv_heads, dim)
        flat[:, places[:context] + LAYER * num_pages * page_size] = history
        rows = slice(row, row + length)
        kv_slots[rows] = places[context:]
        keys, values = (
            np.concatenate([old, np.asarray(jnp.asarray(new[rows], dtype), np.float32)])
            for old, new in zip(history, (k, v), strict=True)
        )
        expected[rows] = dense_attention(q[rows], keys, values, dim**-0.5, masking.window, masking.softcap)
        if masking.plan_window is not None:
            freed = max(context - masking.plan_window + 1, 0) // page_size
            tables[slot, :freed] = 0
            cache[:, LAYER * num_pages + np.array(pages[:freed], int)] = POISON
        row += length
    plan = AttentionPlan(**{name: np.zeros(shape, np.int32) for name, shape in plan_shapes(limits).items()})
    context, lengths = np.array(sequences).T
    make_plan(limits, slot_of, lengths, context + lengths, plan)
    inputs = AttentionInputs(
        jnp.asarray(kv_slots), jnp.asarray(tables), AttentionPlan(*map(jnp.asarray, plan)), num_pages, backend
    )
    pages = KVCache(*jnp.asarray(cache, dtype))
    pages = write_kv(pages, jnp.asarray(k, dtype), jnp.asarray(v, dtype), inputs, LAYER)
    out = paged_attention(
        jnp.asarray(q, dtype), pages, inputs, LAYER,
        scale=dim**-0.5, window=masking.window, softcap=masking.softcap,
    )  # fmt: skip
    assert out.dtype == dtype
    got = np.asarray(out, np.float32)
    assert np.isfinite(got[:row]).all()
    return float(np.abs(got[:row] - expected[:row]).max())


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    count = draw(st.integers(1, 6))
    decode = st.tuples(st.integers(0, 500), st.just(1))
    chunk = st.tuples(st.integers(0, 400), st.integers(2, 90))
    return draw(st.lists(st.one_of(decode, chunk), min_size=count, max_size=count))


@st.composite
def maskings(draw: st.DrawFn) -> Masking:
    window = draw(st.one_of(st.none(), st.integers(1, 20), st.integers(1, 600)))
    widest = None if window is None else draw(st.one_of(st.none(), st.just(window), st.integers(window, 600)))
    return Masking(window, draw(st.sampled_from([None, 1.0, 30.0])), widest)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    batches(),
    st.sampled_from([8, 16, 64, 128]),
    st.sampled_from([(1, 4), (3, 3), (4, 1)]),
    maskings(),
    st.integers(0, 999),
)
def test_any_mix_of_chunks_and_decodes(
    backend: str,
    sequences: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    masking: Masking,
    seed: int,
) -> None:
    kv_heads, group = heads
    num_rows = max(16, 1 << (sum(n for _, n in sequences) - 1).bit_length())
    error = run_batch(
        np.random.default_rng(seed), sequences,
        kv_heads=kv_heads, group=group, dim=16, page_size=page_size, num_rows=num_rows, backend=backend,
        masking=masking,
    )  # fmt: skip
    assert error < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 5, 16, 17, 100, 1000], ids="window_{}".format)
def test_windows_below_at_and_above_the_sizes_of_pages_and_sequences(window: int, backend: str) -> None:
    """In a model where every layer has this window, then in one where others see everything."""
    sequences = [(200, 1), (0, 1), (15, 1), (16, 1), (130, 70), (695, 1), (0, 33), (160, 16)]
    for plan_window in (window, None):
        error = run_batch(
            np.random.default_rng(window), sequences,
            kv_heads=2, group=3, dim=16, page_size=16, num_rows=128, backend=backend,
            masking=Masking(window, 20.0, plan_window),
        )  # fmt: skip
        assert error < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
@pytest.mark.parametrize(
    ("dim", "masking"),
    [(64, Masking()), (128, Masking()), (64, Masking(40, 30.0, 50)), (64, Masking(40, 30.0))],
    ids=["64", "128", "windows", "mixed"],
)
def test_half_precision(dim: int, masking: Masking, dtype: jnp.dtype, bound: float) -> None:
    sequences = [(200, 1), (0, 1), (130, 70), (255, 1), (0, 33)]
    error = run_batch(
        np.random.default_rng(dim), sequences,
        kv_heads=2, group=3, dim=dim, page_size=16, num_rows=128, dtype=dtype, masking=masking,
    )  # fmt: skip
    assert error < bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_float32_head_sizes(dim: int, backend: str) -> None:
    sequences = [(200, 1), (0, 1), (130, 70), (255, 1), (0, 33)]
    error = run_batch(
        np.random.default_rng(dim), sequences, kv_heads=2, group=3, dim=dim, page_size=16, num_rows=128, backend=backend
    )
    assert error < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_decode_items_than_one_group(backend: str) -> None:
    sequences = [(600, 1)] * 9
    error = run_batch(
        np.random.default_rng(0), sequences, kv_heads=1, group=2, dim=8, page_size=8, num_rows=16, backend=backend
    )
    assert error < 2e-5


@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(1, 64)), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(1, 700)),
)
def test_plan_covers_every_row_and_visible_page_once(sequences: list[tuple[int, int]], window: int | None) -> None:
    context, lengths = np.array(sequences).T
    page_size, num_rows = 16, int(lengths.sum()) + 5

    def first_page(position: int) -> int:
        return 0 if window is None else max(0, position - window + 1) // page_size

    pages_held = [-(-(c + n) // page_size) - first_page(c) for c, n in sequences]
    limits = PlanLimits(num_rows, 8, MAX_LEN, page_size, 1 + sum(pages_held), window)
    plan = AttentionPlan(**{name: np.zeros(shape, np.int32) for name, shape in plan_shapes(limits).items()})
    make_plan(limits, np.arange(len(sequences)), lengths, context + lengths, plan)
    decode, prefill = plan.decode[: plan.counts[0]], plan.prefill[: plan.counts[1]]
    seen_rows = np.zeros(num_rows, int)
    for item in prefill:
        sequence, row, count, position, first, end, kv_len, _ = item
        seen_rows[row : row + count] += 1
        assert first == first_page(position)
        assert (end - 1) * page_size <= position + count - 1 < end * page_size
        assert kv_len == context[sequence] + lengths[sequence]
    for sequence in np.unique(decode[:, 0]):
        mine = decode[decode[:, 0] == sequence]
        seen_rows[mine[0, 1]] += 1
        pages = np.concatenate([np.arange(first, end) for first, end in mine[:, 4:6]])
        last = context[sequence]
        assert pages.tolist() == list(range(first_page(last), last // page_size + 1))
        assert plan.decode_rows[sequence] == mine[0, 1]
    assert (seen_rows[: lengths.sum()] == 1).all()
    assert (seen_rows[lengths.sum() :] == 0).all()


@pytest.mark.parametrize("page_size", [1, 16, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 2, 128, 129, 130, 257, 258, 600])
def test_the_longest_decode_work_list_is_as_long_as_the_plan_says(window: int | None, page_size: int) -> None:
    limits = PlanLimits(1, 1, MAX_LEN, page_size, 10**6, window)
    one = np.ones(1, int)
    plan = AttentionPlan(**{name: np.zeros(shape, np.int32) for name, shape in plan_shapes(limits).items()})
    counts = []
    for length in range(1, MAX_LEN + 1):
        make_plan(limits, one - 1, one, one * length, plan)
        counts.append(plan.counts[0])
    assert max(counts) == limits.max_decode_items
