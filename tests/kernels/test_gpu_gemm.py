"""Grouped products for GPUs, in Triton's interpreter, against float64; and what layers ask of them."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.kernels import gpu_gemm, triton_launch
from jaxserve.kernels.backend import Target
from tests.kernels import triton_interpreter

HOPPER = Target("gpu", 90, 132)


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "triton_call", triton_interpreter.triton_call)
        yield


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any), st.integers(0, 20), st.booleans(),
    st.sampled_from([(64, 48), (40, 136), (130, 8)]), st.sampled_from([None, "halves", "silu", "gelu_tanh"]),
    st.sampled_from(["float32", "bfloat16"]), st.integers(0, 999),
)  # fmt: skip
@example([200, 0, 70], 5, True, (64, 48), "silu", "bfloat16", 0)  # several tiles of a group, of 64 rows
@example([600, 1], 0, False, (32, 16), None, "bfloat16", 0)  # of 128
def test_any_groups(
    sizes: list[int], behind: int, gathers: bool, shape: tuple[int, int], kind: str | None, dtype: str, seed: int
) -> None:
    """Rows of empty groups, of several tiles, and of none, which are not written."""
    rng, gate = np.random.default_rng(seed), kind if kind in gpu_gemm.GATES else None
    num_rows, (inputs, outputs) = sum(sizes) + behind, shape
    halves = () if kind is None else (2,)
    x = jnp.asarray(rng.normal(size=(7 if gathers else num_rows, inputs)), dtype)
    weight = jnp.asarray(rng.normal(size=(*halves, len(sizes), inputs, outputs)), dtype)
    rows = jnp.asarray(rng.integers(0, 7, num_rows), jnp.int32) if gathers else None
    found = gpu_gemm.multiply(x, weight, rows, jnp.asarray(sizes, jnp.int32), jnp.dtype("float32"), gate, HOPPER)

    taken = np.asarray(x, np.float64)[np.asarray(rows) if gathers else slice(None)]
    group = np.repeat(np.arange(len(sizes)), sizes)
    each = np.asarray(weight, np.float64).reshape(-1, len(sizes), inputs, outputs)
    made = [np.einsum("ri,rio->ro", taken[: len(group)], half[group]) for half in each]
    if gate is not None:
        first, second = made
        z = first if gate == "silu" else 2 * np.sqrt(2 / np.pi) * (first + 0.044715 * first**3)
        made = [first / (1 + np.exp(-np.maximum(z, -700))) * second]
    assert found.shape == (num_rows, len(made) * outputs)
    np.testing.assert_allclose(found[: len(group)], np.concatenate(made, axis=1), rtol=2e-4, atol=2e-3)
    assert np.isnan(found[len(group) :]).all()
