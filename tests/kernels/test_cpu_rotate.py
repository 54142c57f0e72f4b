"""Native rotation of queries and keys, and the storing of keys and values, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels import native
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.plan import PlanLimits
from tests.kernels.ragged import NATIVE, inputs_for

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
DTYPES = ("float32", "bfloat16")
ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (80, 32), (96, 96), (20, 10), (16, 0)])
def test_tokens_are_rotated_and_stored_and_padding_is_left_out(dim: int, rotated: int, dtype: str) -> None:
    rng = np.random.default_rng(dim)
    rows, kv_heads, group, page_size, num_pages, half = 50, 2, 3, 8, 11, rotated // 2
    qkv = jnp.asarray(rng.normal(size=(rows, kv_heads, group + 2, dim)), dtype)
    angles = rng.uniform(0, 100, (rows, half)).astype(np.float32)
    rotation = (jnp.cos(angles), jnp.sin(angles)) if rotated else None
    pages = [jnp.asarray(rng.normal(size=(2 * num_pages, page_size, kv_heads, dim)), dtype) for _ in "kv"]
    slots = np.where(np.arange(rows) < 40, page_size + rng.permutation(10 * page_size)[:rows], 0)
    inputs = inputs_for(PlanLimits(rows, 1, 8, page_size, num_pages, NATIVE.tiling), NATIVE, slots=slots)
    cache = KVCache(*pages, jnp.ones((2, 2)))
    q, cache = jax.jit(NATIVE.rotate_and_write)(qkv, rotation, cache, inputs, jnp.int32(1))

    values = np.asarray(qkv, np.float64)
    rotating, v = values[:, :, :-1], values[:, :, -1]
    if rotation is not None:
        cos, sin = (np.asarray(table, np.float64)[:, None, None] for table in rotation)
        first, second, rest = np.split(rotating, (half, 2 * half), axis=-1)
        rotating = np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)
    tolerance = {"rtol": ROUNDING[dtype], "atol": 4 * ROUNDING[dtype]}
    assert q.shape == (rows, kv_heads * group, dim)
    np.testing.assert_allclose(
        np.asarray(q[:40], np.float64), rotating[:40, :, :-1].reshape(40, -1, dim), **tolerance
    )  # fmt: skip
    places = num_pages * page_size + slots[:40]
    for before, after, new in zip(pages, cache[:2], (rotating[:, :, -1], v), strict=True):
        before, after = (np.asarray(array, np.float64).reshape(-1, kv_heads, dim) for array in (before, after))
        np.testing.assert_allclose(after[places], new[:40], **tolerance)
        np.testing.assert_array_equal(np.delete(after, places, axis=0), np.delete(before, places, axis=0))
