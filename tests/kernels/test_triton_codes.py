"""Products of 4-bit codes in Triton's interpreter, beside float64 and beside the same codes multiplied by XLA."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.kernels import code_words, triton_launch
from jaxserve.kernels.backend import Target
from jaxserve.models.matrix import MatrixLayout, QuantisedMatrix, WordMatrix, coded_kind
from jaxserve.models.matrix.coded import Division
from jaxserve.sharding.mesh import make_mesh
from tests.kernels import triton_interpreter

TARGET = Target("gpu", 90, 4)
BFLOAT16, FLOAT16 = jnp.dtype("bfloat16"), jnp.dtype("float16")


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "triton_call", triton_interpreter.triton_call)
        yield


def drawn(
    outputs: tuple[int, ...], inputs: int, group: int, *, dtype: jnp.dtype = BFLOAT16, zeros: bool = False,
    minima: bool = False, ordered: bool = False, division: tuple[int, tuple[str | None, ...], str | None] | None = None,
) -> QuantisedMatrix:  # fmt: skip
    """All codes; scales of every size that float16 has."""
    random = np.random.default_rng(inputs + group)
    devices, axes, shared = division or (1, (None,) * len(outputs), None)
    mesh = make_mesh(devices)
    sharding = NamedSharding(mesh, PartitionSpec(*axes, shared))
    small = (*outputs, inputs // group)

    def placed(values: np.ndarray) -> Any:
        return jax.device_put(values, sharding)

    return QuantisedMatrix(
        codes=placed(random.integers(0, 256, (*outputs, inputs // 2), np.uint8)),
        scales=placed((random.uniform(0.5, 1, small) * 2.0 ** random.integers(-20, 2, small)).astype(np.float16)),
        zeros=placed(random.integers(0, 17, small, np.uint8)) if zeros else None,
        minima=placed(random.normal(size=small).astype(np.float16)) if minima else None,
        order=jax.device_put(random.permutation(inputs).astype(np.int32), NamedSharding(mesh, PartitionSpec()))
        if ordered
        else None,
        layout=MatrixLayout(num_outputs=len(outputs)), bits=4, group=group, zero=0 if zeros else 8, dtype=dtype,
        division=Division(mesh, axes, shared) if devices > 1 else None,
    )  # fmt: skip


def exact(codes: QuantisedMatrix) -> np.ndarray:
    """In float64, one digit after the other: ``[outputs, in]``."""
    stored = np.asarray(codes.codes).reshape(-1, codes.codes.shape[-1])
    digits = np.stack([stored % 16, stored // 16], axis=-1).reshape(len(stored), -1).astype(np.float64)

    def by_input(values: jax.Array) -> np.ndarray:
        return np.repeat(np.asarray(values, np.float64).reshape(len(stored), -1), codes.group, axis=1)

    numbers = (digits - (codes.zero if codes.zeros is None else by_input(codes.zeros))) * by_input(codes.scales)
    numbers = numbers if codes.minima is None else numbers + by_input(codes.minima)
    if codes.order is None:
        return numbers
    found = np.empty_like(numbers)
    found[:, np.asarray(codes.order)] = numbers
    return found


def inputs_of(rows: int, codes: QuantisedMatrix, seed: int = 0) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(rows, codes.scales.shape[-1] * codes.group))
    return jnp.asarray(x, codes.dtype)


def check(codes: QuantisedMatrix, rows: int) -> None:
    """Within what sums of float32 may be off, of as many numbers and of their sizes."""
    x, weights = inputs_of(rows, codes), exact(codes)
    matrix = WordMatrix.of(codes, TARGET)
    product = np.asarray(matrix.multiply(x, out_dtype=jnp.dtype("float32")), np.float64)
    wide = np.asarray(x, np.float64)
    sizes = np.abs(wide) @ np.abs(weights).T
    assert np.abs((product - wide @ weights.T) / sizes).max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([16, 32, 64]), st.integers(1, 40), st.integers(0, 99))
def test_words_hold_codes_by_slices(rows: int, inputs: int, num_bytes: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (rows, num_bytes), np.uint8)
    digits = np.stack([codes % 16, codes // 16], axis=-1).reshape(rows, -1)
    words = np.asarray(code_words.pack(jnp.asarray(codes), inputs))
    assert words.shape == (rows, code_words.num_words(2 * num_bytes, inputs))
    for row in range(rows):
        for number in range(2 * num_bytes):
            block, place = divmod(number, 4 * inputs)
            word = int(words[row, block * inputs + place % inputs]) & 0xFFFF
            assert word >> 4 * (place // inputs) & 15 == digits[row, number]
    unpacked = np.asarray(code_words.unpack(jnp.asarray(words), inputs))
    np.testing.assert_array_equal(unpacked[:, : 2 * num_bytes], digits)
    assert not unpacked[:, 2 * num_bytes :].any()


@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 128, 256, 768])
def test_groups(group: int) -> None:
    check(drawn((70,), 768, group), 3)
    check(drawn((40,), 768, group, zeros=True, minima=True), 2)


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 100, 256])
def test_rows(rows: int) -> None:
    check(drawn((136,), 256, 128, zeros=True), rows)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("inputs", [32, 288, 320])
def test_inputs_that_are_no_multiple_of_a_block(inputs: int, dtype: jnp.dtype) -> None:
    check(drawn((20,), inputs, 32, dtype=dtype, zeros=True, minima=True), 2)


def test_parts() -> None:
    """The inputs of few outputs are cut in parts, the last one smaller."""
    codes = drawn((24,), 3200, 128, minima=True)
    jaxpr = str(jax.make_jaxpr(WordMatrix.of(codes, TARGET).multiply)(inputs_of(3, codes)))
    assert "f32[3,3,24]" in jaxpr
    check(codes, 3)


def test_a_row_does_not_depend_on_its_mates() -> None:
    codes = drawn((24,), 2048, 64)
    matrix = WordMatrix.of(codes, TARGET)
    x, others = inputs_of(5, codes), inputs_of(5, codes, seed=1)
    expected = np.asarray(matrix.multiply(x))
    found = np.asarray(matrix.multiply(others.at[3].set(x[3]).at[0].set(jnp.nan)))
    np.testing.assert_array_equal(found[3], expected[3])
    assert np.isfinite(found[1:].astype(np.float32)).all()


@pytest.mark.parametrize("rows", [4, 300])
def test_beside_the_same_codes_multiplied_by_xla(rows: int) -> None:
    """With columns in an order of their own, chosen rows of x, and two halves. More rows than the kernel is for are
    XLA's too, with the same numbers."""
    codes = drawn((2, 36), 96, 32, zeros=True, minima=True, ordered=True)
    matrix, x = WordMatrix.of(codes, TARGET), inputs_of(rows, codes)
    chosen = jnp.arange(rows)[::-1]
    same = np.testing.assert_array_equal if rows > WordMatrix.MOST_ROWS else near
    same(matrix.multiply(x, chosen), codes.multiply(x, chosen))
    same(matrix.gated(x, None, jnp.multiply, None), codes.gated(x, None, jnp.multiply, None))


def near(found: jax.Array, expected: jax.Array) -> None:
    """As sums of bfloat16 numbers are that are rounded to bfloat16, and their products."""
    one, other = (np.asarray(array, np.float32) for array in (found, expected))
    np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-2 * np.abs(other).max())


@pytest.mark.parametrize("ordered", [False, True])
def test_rows_of_the_matrix(ordered: bool) -> None:
    codes = drawn((10,), 96, 32, zeros=True, minima=True, ordered=ordered)
    ids = jnp.array([9, 0, 0])
    np.testing.assert_array_equal(WordMatrix.of(codes, TARGET).lookup(ids), codes.lookup(ids))


@pytest.mark.parametrize(
    ("outputs", "division"),
    [((2, 36), (2, (None, "tensor"), None)), ((20,), (2, (None,), "tensor"))],
    ids=["outputs", "inputs"],
)
@pytest.mark.parametrize("rows", [3, 257])
def test_divided_among_devices(outputs: tuple[int, ...], division: Any, rows: int) -> None:
    """Each device's inputs end within a block."""
    codes = drawn(outputs, 640, 64, zeros=True, division=division)
    abstract = coded_kind(codes, TARGET).abstract(codes, TARGET)
    matrix = WordMatrix.of(codes, TARGET)
    for made, planned in zip(jax.tree.leaves(matrix), jax.tree.leaves(abstract), strict=True):
        assert (made.shape, made.dtype, made.sharding) == (planned.shape, planned.dtype, planned.sharding)
    product = jax.jit(WordMatrix.multiply)(matrix, inputs_of(rows, codes))
    near(product, jnp.asarray(np.asarray(inputs_of(rows, codes), np.float64) @ exact(codes).T))


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = drawn((20,), 64, 32)

    def chosen(codes: QuantisedMatrix, target: Target) -> str:
        matrix = coded_kind(codes, target).of(codes, target)
        return type(matrix).__name__

    assert chosen(codes, TARGET) == "WordMatrix"
    for other in (Target("cpu"), TARGET._replace(compute_capability=75)):
        assert chosen(codes, other) == "QuantisedMatrix"
    assert chosen(replace(codes, dtype=jnp.dtype("float32")), TARGET) == "QuantisedMatrix"
    assert chosen(drawn((20,), 64, 8), TARGET) == "QuantisedMatrix"
    assert chosen(replace(codes, bits=8, codes=jnp.zeros((20, 64), jnp.uint8)), TARGET) == "QuantisedMatrix"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen(codes, TARGET) == "QuantisedMatrix"
