"""Native norms and sums of rows in bfloat16, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels import cpu_norm, native

needs_compiler = pytest.mark.skipif(native.instruction_set() is None, reason="needs a C++ compiler")


def random(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@needs_compiler
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (3, 576), (257, 577), (2, 5120)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_in_bfloat16(rows: int, size: int, offset: float) -> None:
    x, weight = random(0, rows, size), random(1, size)
    found = jax.jit(lambda x, weight: cpu_norm.rms_norm(x, weight, 1e-5, offset))(x, weight)
    wide, scale = np.asarray(x, np.float64), np.asarray(weight, np.float64) + offset
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-30)


@needs_compiler
def test_norm_over_the_last_of_several_dimensions() -> None:
    x, weight = random(0, 5, 3, 4, 64), random(1, 64)
    found = cpu_norm.rms_norm(x, weight, 1e-5, 0.0)
    np.testing.assert_array_equal(found[2, 1, 3], cpu_norm.rms_norm(x[2, 1, 3][None], weight, 1e-5, 0.0)[0])


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 7), (256, 576), (3, 33_000)])
def test_sum_in_bfloat16(shape: tuple[int, int]) -> None:
    x, y = random(0, *shape), random(1, *shape)
    expected = (x.astype("float32") + y.astype("float32")).astype("bfloat16")
    np.testing.assert_array_equal(jax.jit(cpu_norm.add)(x, y), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_for_gpus_have_no_native_calls(dtype: str) -> None:
    """Nor those for CPUs in float32."""

    def between(x: jax.Array, weight: jax.Array) -> jax.Array:
        return cpu_norm.rms_norm(cpu_norm.add(x, x), weight, 1e-5, 0.0)

    traced = jax.jit(between).trace(random(0, 3, 64, dtype=dtype), random(1, 64, dtype=dtype))
    native_calls = {platform: "jaxserve_" in traced.lower(lowering_platforms=(platform,)).as_text()
                    for platform in ("cuda", "cpu")}  # fmt: skip
    assert native_calls == {"cuda": False, "cpu": dtype == "bfloat16" and native.available()}
