"""Native products of matrices that are codes, against those of the dequantised matrices."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.kernels import native
from jaxserve.kernels.cpu_gemm import GATES
from jaxserve.kernels.instruction_sets import AMX, AMX_EMULATED
from jaxserve.models.layers import gate_of
from jaxserve.models.matrix import MatrixLayout, PanelCodes, PanelMatrix, QuantisedMatrix

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
HAS_TILES = native.instruction_set() in (AMX, AMX_EMULATED)
BITS, OFFSETS = (4, 8), ("none", "zero", "zeros", "minima", "zeros and minima")

multiply = jax.jit(lambda matrix, x, rows=None, out_dtype=None: matrix.multiply(x, rows, out_dtype), static_argnums=3)


def drawn(
    outputs: int,
    inputs: int,
    bits: int = 4,
    group: int = 32,
    offsets: str = "minima",
    scale_type: str = "float16",
    seed: int = 0,
    gate: str | None = None,
) -> tuple[QuantisedMatrix, np.ndarray]:
    """A matrix of every code, and its numbers, ``float32[outputs, inputs]``; with a gate, two halves."""
    rng = np.random.default_rng(seed)
    grid = (outputs, inputs // group)
    codes = rng.integers(0, 1 << bits, (outputs, inputs)).astype(np.uint8)
    scales = (rng.normal(size=grid) * 2.0 ** rng.integers(-6, 2, grid)).astype(jnp.dtype(scale_type))
    zero = 1 << (bits - 1) if offsets == "zero" else 0
    zeros = rng.integers(0, 1 << bits, grid).astype(np.uint8) if offsets.startswith("zeros") else None
    minima = rng.normal(size=grid).astype(scales.dtype) if offsets.endswith("minima") else None
    wide = scales.astype(np.float32)
    offset = -(wide * (zero if zeros is None else zeros.astype(np.float32)))
    offset = offset if minima is None else offset + minima.astype(np.float32)
    numbers = codes.astype(np.float64).reshape(*grid, group) * wide[..., None] + offset[..., None]
    stored = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4

    def placed(array: np.ndarray | None) -> jax.Array | None:
        return None if array is None else jnp.asarray(array if gate is None else array.reshape(2, outputs // 2, -1))

    matrix = QuantisedMatrix(
        placed(stored), placed(scales), placed(zeros), placed(minima), None,  # type: ignore[arg-type]
        MatrixLayout(1 if gate is None else 2, gate), bits, group, zero, jnp.dtype("float32"), None,
    )  # fmt: skip
    return matrix, numbers.astype(np.float32).reshape(outputs, inputs)


def rows_of(count: int, inputs: int, dtype: str = "float32", seed: int = 1) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(count, inputs)) * 2.0 ** rng.integers(-8, 8, (count, 1)), dtype)


def panels(numbers: np.ndarray, layout: MatrixLayout = MatrixLayout()) -> PanelMatrix:  # noqa: B008
    return PanelMatrix.of(jnp.asarray(numbers), layout)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 12), st.integers(1, 90), st.sampled_from(BITS), st.sampled_from((8, 32, 64)),
    st.sampled_from(OFFSETS), st.sampled_from(("float32", "bfloat16")), st.booleans(), st.integers(0, 999),
)  # fmt: skip
@example(97, 40, 65, 4, 32, "minima", "float32", False, 0)
@example(1, 3, 49, 8, 128, "zeros", "bfloat16", True, 0)
def test_as_the_dequantised_to_the_last_bit(
    rows: int, groups: int, outputs: int, bits: int, group: int, offsets: str, dtype: str, widened: bool, seed: int
) -> None:
    matrix, numbers = drawn(outputs, groups * group, bits, group, offsets, seed=seed)
    x = rows_of(rows, groups * group, dtype, seed)
    out_dtype = jnp.dtype("float32") if widened else None
    y = multiply(PanelCodes.of(matrix), x, None, out_dtype)
    assert (y.shape, y.dtype) == ((rows, outputs), jnp.float32 if widened else x.dtype)
    if dtype == "bfloat16" and HAS_TILES:
        expected = multiply(panels(numbers.astype(jnp.bfloat16)), x, None, out_dtype)
    else:
        expected = multiply(panels(numbers), x.astype(jnp.float32)).astype(y.dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("scale_type", ["float32", "bfloat16"])
def test_scales_of_other_types(scale_type: str) -> None:
    matrix, numbers = drawn(50, 256, 4, 64, "zeros and minima", scale_type)
    x = rows_of(5, 256)
    y = multiply(PanelCodes.of(matrix), x)
    bound = 300 * 2.0**-23 * (np.abs(x) @ np.abs(numbers).T + np.abs(x).sum(axis=1)[:, None])
    assert (np.abs(y - np.asarray(x, np.float64) @ numbers.astype(np.float64).T) <= bound).all()


def test_scales_that_are_hardly_numbers() -> None:
    """The largest and smallest of float16, below the normal ones too, and none."""
    matrix, _ = drawn(48, 64, offsets="none")
    scales = np.resize(np.array([65504, 6e-8, -5e-6, 6.1e-5, 0, -1], np.float16), (48, 2))
    codes = np.asarray(jnp.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1).reshape(48, 64))
    y = multiply(PanelCodes.of(replace(matrix, scales=jnp.asarray(scales))), jnp.eye(64))
    np.testing.assert_array_equal(y.T, codes * np.repeat(scales.astype(np.float32), 32, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_its_batch_mates(dtype: str) -> None:
    """To the last bit, for every number of rows that a register tile has, and beyond the rows of a task."""
    matrix, x = PanelCodes.of(drawn(70, 288)[0]), rows_of(256, 288, dtype)
    every = np.asarray(multiply(matrix, x))
    for rows in (*range(1, 8), 12, 13, 96, 97, 193):
        np.testing.assert_array_equal(np.asarray(multiply(matrix, x[-rows:])), every[-rows:], err_msg=f"{rows} rows")


def test_only_rows_that_are_wanted() -> None:
    matrix, x = PanelCodes.of(drawn(40, 96)[0]), rows_of(300, 96)
    every = np.asarray(multiply(matrix, x))
    wanted = np.random.default_rng(5).permutation(np.r_[np.arange(0, 300, 2), np.full(90, -1)])
    limited = multiply(matrix, x, jnp.asarray(wanted))
    np.testing.assert_array_equal(np.asarray(limited)[wanted >= 0], every[wanted[wanted >= 0]])
    assert multiply(matrix, x, jnp.full(3, -1)).shape == (3, 40)


@pytest.mark.parametrize("gate", [*GATES, "gelu"])
@pytest.mark.parametrize("half", [8, 44])
def test_gates(gate: str, half: int) -> None:
    """Inside the product and after it."""
    matrix, numbers = drawn(2 * half, 64, gate=gate)
    x = rows_of(21, 64)
    dense = panels(numbers.reshape(2, half, 64), matrix.layout)
    y = PanelCodes.of(matrix).gated(x, None, gate_of(gate), None)
    np.testing.assert_array_equal(y, dense.gated(x, None, gate_of(gate), None))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offsets", OFFSETS)
def test_rows_are_those_of_the_matrix(bits: int, offsets: str) -> None:
    """Also where columns of codes have an order of their own."""
    matrix, numbers = drawn(50, 64, bits, 16, offsets)
    order = np.random.default_rng(0).permutation(64)
    ordered = PanelCodes.of(replace(matrix, order=jnp.asarray(order)))
    ids = jnp.array([49, 0, 16, 15, 0])
    expected = np.zeros_like(numbers)
    expected[:, order] = numbers
    np.testing.assert_array_equal(ordered.lookup(ids), expected[ids])
    np.testing.assert_array_equal(multiply(ordered, jnp.eye(64)).T, expected)


def test_values_that_are_no_numbers_stay_in_their_row() -> None:
    x = rows_of(20, 32).at[3, 5].set(jnp.nan).at[4, 31].set(jnp.inf)
    y = multiply(PanelCodes.of(drawn(20, 32)[0]), x)
    assert np.isnan(y[3]).all()
    assert not np.isfinite(y[4]).any()
    assert np.isfinite(np.delete(y, (3, 4), axis=0)).all()


def test_what_it_does_not_hold() -> None:
    matrix, _ = drawn(8, 60, 8, 12)
    assert PanelCodes.holds(matrix)
    assert not PanelCodes.holds(replace(matrix, codes=matrix.codes.astype(jnp.float8_e4m3fn)))
    assert not PanelCodes.holds(replace(matrix, group=6)), "a unit would have codes of two groups"
    assert not PanelCodes.holds(drawn(8, 60, 4, 12)[0])


def test_what_it_takes_is_known_before() -> None:
    matrix, _ = drawn(40, 96, gate="silu")
    abstract = PanelCodes.abstract(jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), matrix))
    codes = matrix.codes
    made = PanelCodes.of(matrix)
    assert codes.is_deleted()
    assert jax.tree.structure(made) == jax.tree.structure(abstract)
    assert jax.tree.map(lambda array: (array.shape, array.dtype), made) == jax.tree.map(
        lambda spec: (spec.shape, spec.dtype), abstract
    )


def int8(matrix: QuantisedMatrix) -> PanelCodes:
    return PanelCodes.of(matrix, is_int8=True)


def whole_numbers(rows: int, inputs: int, part: int) -> np.ndarray:
    """That are bytes times a power of two, another for each part of a row, and so are not rounded."""
    rng = np.random.default_rng(7)
    parts = rng.integers(-127, 128, (rows, inputs // part, part))
    parts[..., 0] = rng.choice((-127, 127), parts.shape[:2])
    parts[0] = 127
    return (parts * 2.0 ** rng.integers(-4, 4, (rows, inputs // part, 1))).reshape(rows, inputs).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "group", "part"), [(96, 32, 32), (256, 128, 128), (192, 192, 64), (48, 24, 24)])
def test_int8_sums_are_exact(bits: int, inputs: int, group: int, part: int) -> None:
    """The largest codes and rows too: no sum is cut off."""
    matrix, numbers = drawn(33, inputs, bits, group)
    largest = matrix.codes.at[0].set(255)
    scales = np.asarray(matrix.scales, np.float32)
    numbers[0] = ((1 << bits) - 1) * np.repeat(scales[0], group) + np.repeat(
        np.asarray(matrix.minima, np.float32)[0], group
    )
    x = whole_numbers(9, inputs, part)
    y = multiply(int8(replace(matrix, codes=largest)), x)
    bound = (
        16 * 2.0**-24 * (np.abs(x) @ (np.abs(numbers) + 2 * np.abs(np.repeat(scales, group, axis=1)) * (1 << bits)).T)
    )
    assert (np.abs(y - x.astype(np.float64) @ numbers.astype(np.float64).T) <= bound).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_rows_are_rounded_to_the_nearest(bits: int, dtype: str) -> None:
    matrix, numbers = drawn(40, 128, bits)
    x = np.asarray(rows_of(7, 128, dtype), np.float32)
    y = multiply(int8(matrix), jnp.asarray(x, dtype), None, jnp.dtype("float32"))
    steps = np.repeat(np.abs(x.reshape(7, 4, 32)).max(axis=2) / 127, 32, axis=1)
    bound = 0.501 * steps @ np.abs(numbers).T + 1e-5 * np.abs(x) @ np.abs(numbers).T
    error = np.abs(y - x.astype(np.float64) @ numbers.astype(np.float64).T)
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("bits", BITS)
def test_an_int8_row_does_not_depend_on_its_batch_mates(bits: int) -> None:
    matrix, x = int8(drawn(70, 288, bits)[0]), rows_of(200, 288)
    every = np.asarray(multiply(matrix, x))
    for rows in (*range(1, 10), 97):
        np.testing.assert_array_equal(np.asarray(multiply(matrix, x[-rows:])), every[-rows:], err_msg=f"{rows} rows")


def test_int8_rows_that_are_no_numbers_or_none() -> None:
    x = rows_of(20, 32).at[3, 5].set(jnp.nan).at[4, 31].set(jnp.inf).at[5].set(0).at[6].set(1e-38)
    y = np.asarray(multiply(int8(drawn(20, 32)[0]), x))
    assert not np.isfinite(y[3:5]).any()
    assert np.isfinite(np.delete(y, (3, 4), axis=0)).all()
    assert np.abs(y[5:7]).max() < 1e-30


def test_int8_gates() -> None:
    matrix, _ = drawn(32, 64, gate="silu")
    plain = int8(replace(jax.tree.map(jnp.copy, matrix), layout=MatrixLayout(2)))
    x = rows_of(5, 64)
    y = int8(matrix).gated(x, None, gate_of("silu"), None)
    np.testing.assert_allclose(y, plain.gated(x, None, gate_of("silu"), None), rtol=1e-5, atol=1e-30)
