"""Paged attention on CPUs against a dense float64 reference, on random ragged batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels import native
from jaxserve.kernels.attention import paged_attention
from jaxserve.kernels.backend import AttentionShape, Backend
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.cpu_attention import Native
from jaxserve.kernels.instruction_sets import AMX, AMX_EMULATED
from jaxserve.kernels.plan import PlanLimits, Tiling, make_plan, new_plan
from jaxserve.kernels.xla import Xla
from tests.kernels.ragged import CPU, NATIVE, XLA, Masking, batches, inputs_for, maskings, rows_for, run_batch

needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
HAS_TILES = native.instruction_set() in (AMX, AMX_EMULATED)
BACKENDS = [pytest.param(one, id=one.name) for one in ((XLA, NATIVE) if native.available() else (XLA,))]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10, deadline=None)
@given(
    batches(),
    st.sampled_from([8, 16, 64, 128]),
    st.sampled_from([(1, 4), (3, 3), (4, 1)]),
    maskings(),
    st.integers(0, 20),
    st.integers(0, 999),
)
def test_any_mix_of_chunks_and_decodes(
    backend: Backend,
    sequences: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    masking: Masking,
    shared_pages: int,
    seed: int,
) -> None:
    kv_heads, group = heads
    error = run_batch(
        np.random.default_rng(seed), sequences,
        kv_heads=kv_heads, group=group, dim=16, page_size=page_size, num_rows=rows_for(sequences), backend=backend,
        masking=masking, shared_pages=shared_pages,
    )  # fmt: skip
    assert error < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 5, 16, 17, 100, 1000], ids="window_{}".format)
def test_windows_below_at_and_above_the_sizes_of_pages_and_sequences(window: int, backend: Backend) -> None:
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
        kv_heads=2, group=3, dim=dim, page_size=16, num_rows=128, dtype=jnp.dtype(dtype), masking=masking,
    )  # fmt: skip
    assert error < bound


@needs_compiler
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 256])
def test_native_bfloat16_rounds_the_result_only(dim: int) -> None:
    """Everything between queries, cache and outputs is float32."""
    sequences = [(200, 1), (0, 1), (130, 70), (255, 1), (0, 33)]
    error = run_batch(
        np.random.default_rng(dim), sequences, kv_heads=2, group=3, dim=dim, page_size=16, num_rows=128,
        dtype=jnp.dtype("bfloat16"), backend=NATIVE, masking=Masking(90, 30.0),
    )  # fmt: skip
    assert error < 1.6e-2  # half of bfloat16's step between 4 and 8


@needs_compiler
@settings(max_examples=10, deadline=None)
@given(
    batches(),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([(1, 4), (3, 3), (4, 1), (1, 20)]),
    st.sampled_from([32, 64, 96]),
    maskings(),
    st.integers(0, 999),
)
def test_native_bfloat16_in_any_mix(
    sequences: list[tuple[int, int]], page_size: int, heads: tuple[int, int], dim: int, masking: Masking, seed: int
) -> None:
    kv_heads, group = heads
    error = run_batch(
        np.random.default_rng(seed), sequences, kv_heads=kv_heads, group=group, dim=dim, page_size=page_size,
        num_rows=rows_for(sequences), dtype=jnp.dtype("bfloat16"), backend=NATIVE, masking=masking,
    )  # fmt: skip
    assert error < 3e-2


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "masking"),
    [
        ("float32", Masking()),
        ("bfloat16", Masking()),
        *([("bfloat16", Masking(40)), ("bfloat16", Masking(chunk=100))] if HAS_TILES else []),
    ],
    ids=str,
)
def test_native_outputs_do_not_depend_on_how_a_prompt_is_cut(dtype: str, masking: Masking) -> None:
    """To the last bit: into items of any numbers of rows."""
    outputs: list[np.ndarray] = []
    for rows in (64, 24, 7):
        run_batch(
            np.random.default_rng(5), [(130, 70), (0, 33), (300, 20)], kv_heads=2, group=3, dim=64, page_size=16,
            num_rows=128, dtype=jnp.dtype(dtype), backend=Native(Tiling(128, rows), CPU), masking=masking,
            outputs=outputs,
        )  # fmt: skip
    for other in outputs[1:]:
        np.testing.assert_array_equal(other, outputs[0])


@needs_compiler
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize(("kv_heads", "group"), [(3, 3), (2, 16), (1, 20)])
def test_native_bfloat16_of_drafts_in_company(kv_heads: int, group: int, window: int | None) -> None:
    """A sequence's rows, the last of them drafts, are to the last bit what each is by itself, also where one
    of them begins another part of the keys."""
    rng, page, kv_lens = np.random.default_rng(group), 16, np.array([126, 127, 128, 129, 130, 50, 300, 301])
    sequences, num_rows = np.array([0, 0, 0, 0, 0, 1, 2, 2]), 16
    limits = PlanLimits(num_rows, 4, 400, page, 100, NATIVE.tiling, window, max_drafts=8)
    tables = rng.permutation(np.arange(1, 79)).reshape(3, 26)
    tables = np.concatenate((tables, np.zeros((1, 26), int))).astype(np.int32)
    k, v = rng.normal(size=(2, 100, page, kv_heads, 64)).astype(np.float32)
    cache = KVCache(jnp.asarray(k, "bfloat16"), jnp.asarray(v, "bfloat16"), None, None)
    q = jnp.asarray(rng.normal(size=(num_rows, kv_heads * group, 64)), "bfloat16")

    def attended(rows: slice) -> np.ndarray:
        plan = new_plan(limits)
        make_plan(limits, sequences[rows], np.ones(len(kv_lens[rows]), int), kv_lens[rows], plan)
        inputs = inputs_for(limits, NATIVE, tables=tables, plan=plan)
        shift = jnp.roll(q, -rows.start, axis=0)
        out = paged_attention(shift, cache, inputs, jnp.int32(0), scale=0.125, window=window)
        return np.asarray(out, np.float32)[: len(kv_lens[rows])]

    together = attended(slice(0, 8))
    for row in range(8):
        np.testing.assert_array_equal(together[row], attended(slice(row, row + 1))[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_float32_head_sizes(dim: int, backend: Backend) -> None:
    sequences = [(200, 1), (0, 1), (130, 70), (255, 1), (0, 33)]
    error = run_batch(
        np.random.default_rng(dim), sequences, kv_heads=2, group=3, dim=dim, page_size=16, num_rows=128, backend=backend
    )
    assert error < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_values(backend: Backend) -> None:
    """As of DeepSeek-V3, whose 128 query heads share a latent of 512 and 64 rotated dimensions."""
    group, dim = 128, 576
    shape = AttentionShape(group, 1, dim, 16, jnp.dtype("float32"), jnp.dtype("float32"), has_values=False)
    error = run_batch(
        np.random.default_rng(dim), [(200, 1), (0, 1), (30, 20), (255, 1), (0, 9)], kv_heads=1, group=group, dim=dim,
        page_size=16, num_rows=32, backend=backend.of(CPU, shape), has_values=False,
    )  # fmt: skip
    assert error < 2e-5


def test_float8_keys_that_are_values() -> None:
    error = run_batch(
        np.random.default_rng(3), [(200, 1), (130, 70), (0, 33)], kv_heads=1, group=4, dim=40, page_size=16,
        num_rows=128, cache_dtype=jnp.dtype(jnp.float8_e4m3fn), scales=(0.03, 0.03), has_values=False,
    )  # fmt: skip
    assert error < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_decode_items_than_one_group(backend: Backend) -> None:
    sequences = [(600, 1)] * 9
    error = run_batch(
        np.random.default_rng(0), sequences, kv_heads=1, group=2, dim=8, page_size=8, num_rows=16, backend=backend
    )
    assert error < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_decode_items_than_a_cache_of_shared_pages_has(backend: Backend) -> None:
    """Sequences may see more pages together than there are."""
    sequences = [(600, 1), (580, 1), (610, 1), (0, 5), (500, 1)]
    error = run_batch(
        np.random.default_rng(0), sequences, kv_heads=1, group=2, dim=8, page_size=8, num_rows=16, backend=backend,
        shared_pages=62,
    )  # fmt: skip
    assert error < 2e-5


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.03, 2.5)], ids=str)
def test_float8_caches_are_read_with_their_scales(scales: tuple[float, float]) -> None:
    """Against the reference on what the cache holds: only the products' rounding is left."""
    sequences = [(200, 1), (0, 1), (130, 70), (255, 1), (0, 33)]
    error = run_batch(
        np.random.default_rng(3), sequences, kv_heads=2, group=3, dim=64, page_size=16, num_rows=128,
        cache_dtype=jnp.dtype(jnp.float8_e4m3fn), scales=scales,
    )  # fmt: skip
    assert error < 1e-4


def test_float8_caches_clip_what_they_cannot_hold() -> None:
    """A plain conversion would store NaN."""
    qkv = jnp.full((1, 1, 3, 8), 1e6)
    pages = jnp.zeros((2, 8, 1, 8), jnp.float8_e4m3fn)
    cache = KVCache(pages, pages, jnp.array([[1.0, 10.0]]))
    inputs = inputs_for(PlanLimits(1, 1, 8, 8, 2, XLA.tiling), XLA, slots=np.array([9]))
    _, cache = XLA.rotate_and_write(qkv, None, cache, inputs, jnp.int32(0))
    assert float(cache.k[1, 1, 0, 0]) == float(cache.v[1, 1, 0, 0]) == 448


@pytest.mark.parametrize("tiling", [Tiling(16, 64), Tiling(48, 5), Tiling(1024, 200)], ids=str)
def test_any_tiling(tiling: Tiling) -> None:
    sequences = [(600, 1), (130, 70), (0, 1), (255, 1), (0, 33)]
    error = run_batch(
        np.random.default_rng(0), sequences, kv_heads=2, group=3, dim=16, page_size=16, num_rows=128,
        backend=Xla(tiling, CPU),
    )  # fmt: skip
    assert error < 2e-5


@pytest.mark.parametrize("half", [4, 8])
def test_rotation(half: int) -> None:
    """Of complex numbers: the plainest form of RoPE (arXiv 2104.09864, section 3.2.2)."""
    rng = np.random.default_rng(0)
    qkv, angles = rng.normal(size=(5, 2, 5, 16)), rng.uniform(0, 6, size=(5, half))
    pages = jnp.zeros((3, 8, 2, 16))
    slots = np.array([8, 9, 20, 11, 16])
    rotation = jnp.cos(angles), jnp.sin(angles)
    inputs = inputs_for(PlanLimits(5, 1, 8, 8, 3, XLA.tiling), XLA, slots=slots)
    q, (k, v, *_) = XLA.rotate_and_write(
        jnp.asarray(qkv), rotation, KVCache(pages, pages, jnp.ones((1, 2))), inputs, jnp.int32(0)
    )
    turned = (qkv[..., :half] + 1j * qkv[..., half : 2 * half]) * np.exp(1j * angles)[:, None, None]
    expected = np.concatenate([turned.real, turned.imag, qkv[..., 2 * half :]], axis=-1)
    np.testing.assert_allclose(q.reshape(5, 2, 3, 16), expected[:, :, :3], atol=1e-5)
    np.testing.assert_allclose(k.reshape(-1, 2, 16)[slots], expected[:, :, 3], atol=1e-5)
    np.testing.assert_allclose(v.reshape(-1, 2, 16)[slots], qkv[:, :, 4], atol=1e-6)
    assert jax.tree.map(lambda pages: int((pages != 0).sum()), (k, v)) == (5 * 2 * 16,) * 2
