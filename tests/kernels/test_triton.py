"""The Triton kernels, in Triton's interpreter, against a dense float64 reference and the kernels in plain XLA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels import triton_launch, triton_pod
from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.backend import Backend, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.plan import BusyPrograms, PlanLimits, Tiling, make_plan, new_plan
from jaxserve.kernels.pod_attention import Pod
from jaxserve.kernels.triton_attention import Triton
from tests.kernels import ragged, triton_interpreter
from tests.kernels.ragged import XLA, Masking, inputs_for, maskings, rows_for, run_batch

FEW_SPLITS, MANY_SPLITS = BusyPrograms(4, 2), BusyPrograms(40, 20)
FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)
MIXED = [(200, 1), (0, 1), (70, 50), (130, 1), (0, 33)]
"""(context, query length): decodes with and without context, chunks of begun and of new prompts."""


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Kernels run in the interpreter; what they must not read is not a number, of which no multiple is 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "triton_call", triton_interpreter.triton_call)
        patch.setattr(ragged, "POISON", float("nan"))
        yield


def triton(decode_tokens: int = 64, tile_rows: int = 16, busy: BusyPrograms = FEW_SPLITS) -> Backend:
    return Triton(Tiling(decode_tokens, tile_rows, busy), Target("gpu", 90, 4))


@st.composite
def small_batches(draw: st.DrawFn) -> list[tuple[int, int]]:
    decode = st.tuples(st.integers(0, 300), st.just(1))
    chunk = st.tuples(st.integers(0, 150), st.integers(2, 40))
    return draw(st.lists(st.one_of(decode, chunk), min_size=1, max_size=4))


@settings(max_examples=25, deadline=None)
@given(
    small_batches(),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from([(1, 4), (2, 3), (3, 1)]),
    maskings(),
    st.tuples(st.sampled_from([16, 64]), st.sampled_from([5, 16]), st.sampled_from([FEW_SPLITS, MANY_SPLITS])),
    st.integers(0, 999),
)
def test_any_mix_of_chunks_and_decodes(
    sequences: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    masking: Masking,
    tiling: tuple[int, int, BusyPrograms],
    seed: int,
) -> None:
    kv_heads, group = heads
    error = run_batch(
        np.random.default_rng(seed), sequences,
        kv_heads=kv_heads, group=group, dim=16, page_size=page_size, num_rows=rows_for(sequences),
        backend=triton(*tiling), masking=masking,
    )  # fmt: skip
    assert error < 2e-5


@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_split_decodes_and_chunks(page_size: int) -> None:
    backend = triton(16, 8, MANY_SPLITS)
    sequences = [(600, 1), (0, 1), (300, 10), (0, 20)]
    context, lengths = np.array(sequences).T
    limits = PlanLimits(32, 4, ragged.MAX_LEN, page_size, 64, backend.tiling)
    plan = new_plan(limits)
    make_plan(limits, np.arange(4), lengths, context + lengths, plan)
    split_rows = plan.combine[: plan.counts[2], 1]
    assert 1 in split_rows
    assert 8 in split_rows

    error = run_batch(
        np.random.default_rng(page_size), sequences, kv_heads=2, group=2, dim=16, page_size=page_size, num_rows=32,
        backend=backend,
    )  # fmt: skip
    assert error < 2e-5


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("window", [1, 5, 17, 64, 100], ids="window_{}".format)
def test_windows_below_at_and_above_the_sizes_of_pages_and_tiles(window: int, page_size: int) -> None:
    """In a model where every layer has this window, then in one where others see everything."""
    for plan_window, busy in ((window, FEW_SPLITS), (None, MANY_SPLITS)):
        error = run_batch(
            np.random.default_rng(window), MIXED,
            kv_heads=1, group=2, dim=16, page_size=page_size, num_rows=96, backend=triton(16, 16, busy),
            masking=Masking(window, 20.0, plan_window),
        )  # fmt: skip
        assert error < 2e-5


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_head_sizes(dim: int) -> None:
    error = run_batch(
        np.random.default_rng(dim), MIXED, kv_heads=1, group=3, dim=dim, page_size=64, num_rows=128, backend=triton()
    )
    assert error < 2e-5


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 3e-2), (jnp.float16, 4e-3)])
@pytest.mark.parametrize("masking", [Masking(), Masking(40, 30.0, 50), Masking(40, 30.0)], ids=str)
def test_half_precision(masking: Masking, dtype: jnp.dtype, bound: float) -> None:
    error = run_batch(
        np.random.default_rng(1), MIXED, kv_heads=2, group=2, dim=64, page_size=32, num_rows=96,
        dtype=jnp.dtype(dtype), backend=triton(), masking=masking,
    )  # fmt: skip
    assert error < bound


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.03, 2.5)], ids=str)
def test_float8_caches(scales: tuple[float, float], dtype: jnp.dtype, bound: float, softcap: float | None) -> None:
    """Against the reference on what the cache holds."""
    error = run_batch(
        np.random.default_rng(3), MIXED, kv_heads=2, group=2, dim=32, page_size=32, num_rows=96,
        dtype=jnp.dtype(dtype), cache_dtype=FLOAT8, scales=scales, backend=triton(busy=MANY_SPLITS),
        masking=Masking(softcap=softcap),
    )  # fmt: skip
    assert error < bound * scales[1]


def pod(busy: BusyPrograms = FEW_SPLITS) -> Backend:
    return Pod(Tiling(16, 8, busy, fused=BusyPrograms(6, 3)), Target("gpu", 90, 4))


@pytest.mark.parametrize("seed", range(6))
def test_one_launch_for_both_kinds_takes_every_item_once_in_any_order(seed: int) -> None:
    """Programs run at once, on any multiprocessors. What nobody took would leave numbers that are none."""
    taken: list[tuple[bool, int, int]] = []
    attend_item = triton_pod.attend_item

    def spy(*operands: Any) -> None:
        item_ptr, kv_head, out_ptr = operands[4], operands[5], operands[9]
        taken.append((out_ptr is None, int(item_ptr.handle.data[0]), int(kv_head.handle.data[0])))
        attend_item(*operands)

    sequences = [(200, 1), (0, 1), (70, 50), (130, 1), (0, 33)] if seed % 2 else [(300, 1), (250, 20)]
    with pytest.MonkeyPatch.context() as patch, triton_interpreter.interleaved(seed):
        patch.setattr(triton_pod, "attend_item", spy)
        error = run_batch(
            np.random.default_rng(seed), sequences, kv_heads=2, group=2, dim=16, page_size=16, num_rows=96,
            backend=pod(), masking=Masking(100 if seed % 3 else None),
        )  # fmt: skip
    assert error < 2e-5
    assert len(taken) == len(set(taken)) == 2 * num_items(pod(), sequences, 96)
    assert {decode for decode, *_ in taken} == {True, False}


def num_items(backend: Backend, sequences: list[tuple[int, int]], num_rows: int) -> int:
    """Of both kinds, in a fused launch."""
    return int(inputs_of(backend, sequences, num_rows, 16).plan.counts[3:].sum())


@pytest.mark.parametrize("sequences", [[(200, 1), (0, 1), (130, 1)], [(70, 50), (0, 33)]], ids=["decodes", "chunks"])
def test_pure_batches_have_launches_of_their_own(sequences: list[tuple[int, int]]) -> None:
    with triton_interpreter.interleaved(0):
        error = run_batch(
            np.random.default_rng(0), sequences, kv_heads=2, group=2, dim=16, page_size=16, num_rows=96, backend=pod()
        )
    assert error < 2e-5
    assert num_items(pod(), sequences, 96) == 0


def inputs_of(backend: Backend, sequences: list[tuple[int, int]], num_rows: int, page_size: int) -> AttentionInputs:
    """Inputs of a batch whose sequences hold consecutive pages."""
    context, lengths = np.array(sequences).T
    held = -(-(context + lengths) // page_size)
    num_pages = 1 + int(held.sum())
    limits = PlanLimits(num_rows, len(sequences), ragged.MAX_LEN, page_size, num_pages, backend.tiling)
    plan = new_plan(limits)
    make_plan(limits, np.arange(len(sequences)), lengths, context + lengths, plan)
    tables = np.zeros((len(sequences), -(-ragged.MAX_LEN // page_size)), np.int32)
    for table, first, count in zip(tables, 1 + np.cumsum(held) - held, held, strict=True):
        table[:count] = first + np.arange(count)
    return inputs_for(limits, backend, tables=tables, plan=plan)


def test_the_twin_in_xla_agrees_in_a_compiled_program() -> None:
    """On the whole output, padding included, for two layers of one program."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(112, 6, 32)), jnp.float32)
    outputs = []
    for backend in (triton(16, 16, MANY_SPLITS), XLA):
        inputs = inputs_of(backend, MIXED, num_rows=112, page_size=32)
        cache = np.random.default_rng(1).normal(size=(2, 2 * inputs.limits.num_pages, 32, 2, 32))
        pages = KVCache(*jnp.asarray(cache, jnp.float32), jnp.ones((2, 2)))

        @jax.jit
        def two_layers(q: jax.Array, pages: KVCache[jax.Array], inputs: AttentionInputs) -> list[jax.Array]:
            return [
                paged_attention(q, pages, inputs, jnp.int32(layer), scale=0.2, window=window, softcap=10.0)
                for layer, window in enumerate((None, 60))
            ]

        outputs.append(two_layers(q, pages, inputs))
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("rotated", [0, 8, 20, 32], ids="{}_rotated".format)
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "float8_e4m3fn"), ("bfloat16", "float8_e4m3fn")],
)
def test_rotating_and_writing(rotated: int, dtype: str, cache_dtype: str) -> None:
    """As the twin in XLA does; all other rows of the cache stay as they were."""
    rng = np.random.default_rng(rotated)
    rows, real, num_pages, page_size, kv_heads, group, dim = 21, 18, 5, 16, 2, 3, 32
    qkv = jnp.asarray(rng.normal(size=(rows, kv_heads, group + 2, dim)), dtype)
    angles = rng.uniform(0, 6, size=(rows, rotated // 2))
    rotation = (jnp.cos(angles), jnp.sin(angles)) if rotated else None
    slots = np.zeros(rows, np.int32)
    slots[:real] = rng.permutation(np.arange(page_size, num_pages * page_size))[:real]
    pages = jnp.asarray(rng.normal(size=(2, 3 * num_pages, page_size, kv_heads, dim)), cache_dtype)
    cache = KVCache(*pages, jnp.asarray([[1, 1], [0.004, 0.5], [1, 1]], jnp.float32))
    inputs = inputs_for(PlanLimits(rows, 1, 32, page_size, num_pages, triton().tiling), triton(), slots=slots)

    ours, theirs = (
        jax.jit(rotate_and_write)(qkv, rotation, cache, replace(inputs, backend=backend), jnp.int32(1))
        for backend in (inputs.backend, XLA)
    )
    steps = {"float32": 1e-6, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3}
    np.testing.assert_allclose(*(np.asarray(q, np.float32) for q in (ours[0], theirs[0])), rtol=steps[dtype], atol=1e-6)
    touched = slots[:real] + num_pages * page_size
    for name in ("k", "v"):
        got, expected, before = (
            np.asarray(getattr(c, name), np.float32).reshape(-1, kv_heads, dim) for c in (ours[1], theirs[1], cache)
        )
        np.testing.assert_allclose(got[touched], expected[touched], rtol=steps[cache_dtype], atol=1e-6)
        others = np.ones(len(got), bool)
        others[touched] = others[num_pages * page_size] = False
        np.testing.assert_array_equal(got[others], before[others])
    if cache_dtype == "float8_e4m3fn":
        assert np.abs(np.asarray(theirs[1].k, np.float32)).max() == 448, "keys too large for their scale are clipped"
