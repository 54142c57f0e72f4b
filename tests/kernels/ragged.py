"""Random ragged batches: paged attention by any backend against a dense float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.backend import CPU_TILING, Backend, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.cpu_attention import Native
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.plan import AttentionPlan, PlanLimits, make_plan, new_plan
from jaxserve.kernels.xla import Xla

LAYERS, LAYER = 2, 1
CPU, FLOAT32 = Target("cpu"), jnp.dtype("float32")
XLA, NATIVE = Xla(CPU_TILING, CPU), Native(CPU_TILING, CPU)
MAX_LEN = 700
POISON = 400.0
"""Finite in every type that a cache may have."""


@dataclass(frozen=True)
class Masking:
    """What is special about a layer's attention, and whether the plan knows of its window."""

    window: int | None = None
    softcap: float | None = None
    plan_window: int | None = None
    """The model's widest window; None also when other layers have none."""
    chunk: int | None = None
    sinks: tuple[float, float] | None = None
    """Mean and deviation of the heads' sinks."""

    def draw_sinks(self, rng: np.random.Generator, heads: int) -> np.ndarray | None:
        return None if self.sinks is None else rng.normal(*self.sinks, size=heads).astype(np.float32)


def dense_attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    scale: float,
    window: int | None,
    softcap: float | None,
    chunk: int | None = None,
    sinks: np.ndarray | None = None,
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
        if chunk is not None:
            visible &= np.arange(length) // chunk == position // chunk
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = keys[visible, kv].astype(np.float64) @ q[row, head].astype(np.float64) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            sink = -np.inf if sinks is None else float(sinks[head])
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            total = weights.sum() + np.exp(sink - top)
            out[row, head] = weights @ values[visible, kv].astype(np.float64) / total
    return out


def stored(values: np.ndarray, dtype: jnp.dtype, cache_dtype: jnp.dtype, scale: float) -> np.ndarray:
    """What a cache makes of ``values``."""
    values = np.asarray(jnp.asarray(values, dtype), np.float32)
    if cache_dtype.itemsize > 1:
        return values
    return np.asarray(jnp.asarray(jnp.asarray(values / scale, dtype), cache_dtype), np.float32) * scale


def inputs_for(
    limits: PlanLimits,
    backend: Backend,
    *,
    slots: np.ndarray | None = None,
    tables: np.ndarray | None = None,
    plan: AttentionPlan[np.ndarray] | None = None,
) -> AttentionInputs:
    """Without what is not given: rows that are padding, sequences that have no pages, nothing to attend to."""
    if slots is None:
        slots = np.zeros(limits.num_rows, np.int32)
    if tables is None:
        tables = np.zeros((limits.max_num_seqs, -(-limits.max_model_len // limits.page_size)), np.int32)
    plan = AttentionPlan(*map(jnp.asarray, plan or new_plan(limits)))
    return AttentionInputs(jnp.asarray(slots, jnp.int32), jnp.asarray(tables), plan, limits, backend, mesh=None)


def run_batch(
    rng: np.random.Generator,
    sequences: list[tuple[int, int]],
    *,
    kv_heads: int,
    group: int,
    dim: int,
    page_size: int,
    num_rows: int,
    dtype: jnp.dtype = FLOAT32,
    cache_dtype: jnp.dtype | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    backend: Backend = XLA,
    masking: Masking = Masking(),
    shared_pages: int = 0,
    has_values: bool = True,
    outputs: list[np.ndarray] | None = None,
) -> float:
    """Largest error over a batch of (context, query length) sequences whose earlier tokens are already cached.

    ``scales``: of keys and values in a cache of another type than ``dtype``. ``shared_pages``: which sequences whose
    context fills them have in common; they come first. ``has_values``: without, keys are their own values. ``outputs``:
    what comes out is put there.
    """

    def of_both(*size: int) -> np.ndarray:
        drawn = rng.normal(size=(2, *size)).astype(np.float32)
        return drawn if has_values else drawn[[0, 0]]

    cache_dtype = cache_dtype or dtype
    heads, slots = kv_heads * group, len(sequences) + 2
    pages_per_seq = -(-MAX_LEN // page_size)
    shared_tokens = shared_pages * page_size
    own_pages = [-(-(c + n) // page_size) - shared_pages * (c >= shared_tokens) for c, n in sequences]
    num_pages = 1 + shared_pages + sum(own_pages) + 3
    limits = PlanLimits(num_rows, slots, MAX_LEN, page_size, num_pages, backend.tiling, masking.plan_window)
    free = list(rng.permutation(np.arange(1, num_pages)))
    prefix_pages = [free.pop() for _ in range(shared_pages)]
    prefix = of_both(shared_tokens, kv_heads, dim)
    slot_of = rng.permutation(slots)[: len(sequences)]
    tables = np.zeros((slots, pages_per_seq), np.int32)
    qkv = rng.normal(size=(num_rows, kv_heads, group + 2, dim)).astype(np.float32)
    if not has_values:
        qkv = qkv[:, :, :-1]
    q, k, v = qkv[:, :, :group].reshape(num_rows, heads, dim), qkv[:, :, group], qkv[:, :, -1]
    kv_slots = np.zeros(num_rows, np.int32)
    sinks = masking.draw_sinks(rng, heads)
    # Poisoned: what nobody wrote must not be read.
    cache = np.full((2, LAYERS * num_pages, page_size, kv_heads, dim), POISON, np.float32)
    row, expected = 0, np.zeros((num_rows, heads, dim))
    for slot, (context, length), count in zip(slot_of, sequences, own_pages, strict=True):
        total = context + length
        pages = [free.pop() for _ in range(count)]
        own = set(pages)
        history = of_both(context, kv_heads, dim)
        if context >= shared_tokens:
            pages, history[:, :shared_tokens] = prefix_pages + pages, prefix
        tables[slot, : len(pages)] = pages
        places = np.array(pages)[np.arange(total) // page_size] * page_size + np.arange(total) % page_size
        flat = cache.reshape(2, -1, kv_heads, dim)
        rows = slice(row, row + length)
        kv_slots[rows] = places[context:]
        held = []
        for old, new, target, scale in zip(history, (k, v), flat, scales, strict=True):
            target[places[:context] + LAYER * num_pages * page_size] = old / scale
            held.append(stored(np.concatenate([old, new[rows]]), dtype, cache_dtype, scale))
        rounded = np.asarray(jnp.asarray(q[rows], dtype), np.float32)
        expected[rows] = dense_attention(
            rounded, *held, dim**-0.5, masking.window, masking.softcap, masking.chunk, sinks
        )
        if masking.plan_window is not None:
            freed = max(context - masking.plan_window + 1, 0) // page_size
            tables[slot, :freed] = 0
            cache[:, LAYER * num_pages + np.array([page for page in pages[:freed] if page in own], int)] = POISON
        row += length
    plan = new_plan(limits)
    context, lengths = np.array(sequences).T
    make_plan(limits, slot_of, lengths, context + lengths, plan)
    inputs = inputs_for(limits, backend, slots=kv_slots, tables=tables, plan=plan)
    layer = jnp.int32(LAYER)
    k_pages, v_pages = jnp.asarray(jnp.asarray(cache, dtype), cache_dtype)
    pages = KVCache(
        k_pages, v_pages if has_values else None, jnp.tile(jnp.asarray(scales[: 1 + has_values]), (LAYERS, 1))
    )  # fmt: skip
    rotated, pages = rotate_and_write(jnp.asarray(qkv, dtype), None, pages, inputs, layer)
    out = paged_attention(
        rotated, pages, inputs, layer, scale=dim**-0.5, window=masking.window, softcap=masking.softcap,
        chunk=masking.chunk, sinks=None if sinks is None else jnp.asarray(sinks),
    )  # fmt: skip
    assert out.dtype == dtype
    got = np.asarray(out, np.float32)
    assert np.isfinite(got[:row]).all()
    assert not got[row:].any()
    if outputs is not None:
        outputs.append(got)
    return float(np.abs(got[:row] - expected[:row]).max())


@st.composite
def batches(draw: st.DrawFn, most: int = 6) -> list[tuple[int, int]]:
    """(context, query length) of up to ``most`` sequences."""
    count = draw(st.integers(1, most))
    decode = st.tuples(st.integers(0, 500), st.just(1))
    chunk = st.tuples(st.integers(0, 400), st.integers(2, 90))
    return draw(st.lists(st.one_of(decode, chunk), min_size=count, max_size=count))


def rows_for(sequences: list[tuple[int, int]]) -> int:
    """A power of two that holds the batch."""
    return max(16, 1 << (sum(n for _, n in sequences) - 1).bit_length())


@st.composite
def maskings(draw: st.DrawFn) -> Masking:
    window = draw(st.one_of(st.none(), st.integers(1, 20), st.integers(1, 600)))
    widest = None if window is None else draw(st.one_of(st.none(), st.just(window), st.integers(window, 600)))
    sinks = draw(st.sampled_from([None, (0.0, 1.0), (8.0, 4.0)]))
    chunk = None if window is not None else draw(st.one_of(st.none(), st.integers(1, 20), st.integers(1, 600)))
    return Masking(window, draw(st.sampled_from([None, 1.0, 30.0])), widest, chunk, sinks)
