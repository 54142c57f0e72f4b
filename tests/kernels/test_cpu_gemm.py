"""Native matrix products against float64, and an engine without them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve import LLM, SamplingParams
from jaxserve.kernels import native
from jaxserve.kernels.cpu_gemm import GATES
from jaxserve.kernels.instruction_sets import AMX, AMX_EMULATED
from jaxserve.models.layers import gate_of
from jaxserve.models.matrix import MatrixLayout, PanelMatrix, abstract_taken, taken
from tests.models.golden import Golden

needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
DTYPES = ("float32", "bfloat16")
FLUSHED = 1e-35
"""vdpbf16ps takes numbers below float32's normal ones as 0."""

multiply = jax.jit(PanelMatrix.multiply, static_argnames="out_dtype")


def panels(weight: jax.Array, num_outputs: int = 1, gate: str | None = None) -> PanelMatrix:
    """Of a copy, for it deletes what it packs."""
    return PanelMatrix.of(weight.copy(), MatrixLayout(num_outputs, gate))


def operands(rows: int, inputs: int, outputs: int, dtype: str, seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=(n, inputs)) * 2.0 ** rng.integers(-8, 8, (n, 1)) for n in (rows, outputs))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def sum_errors(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """At most, of sums of K products in float32 (Higham, Accuracy and Stability, 3.1)."""
    return (x.shape[1] + 1) * 2.0**-24 * (np.abs(x) @ np.abs(w).mT) + x.shape[1] * FLUSHED


def assert_within_bounds(y: jax.Array, x: jax.Array, w: jax.Array) -> None:
    """Of ``sum_errors``, and of the rounding to bfloat16."""
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    bound, expected = sum_errors(x64, w64), x64 @ w64.mT
    if y.dtype == jnp.bfloat16:
        bound += 2.0**-8 * (np.abs(expected) + bound)
    assert (np.abs(np.asarray(y, np.float64) - expected) <= bound).all()


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 200), st.integers(1, 200), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
@example(300, 2600, 33, "float32", True, 0)  # several blocks along K, several row chunks
@example(300, 5001, 33, "bfloat16", False, 0)
def test_any_shape(rows: int, inputs: int, outputs: int, dtype: str, widened: bool, seed: int) -> None:
    x, w = operands(rows, inputs, outputs, dtype, seed)
    y = multiply(panels(w), x, out_dtype=jnp.dtype("float32") if widened else None)
    assert y.shape == (rows, outputs)
    assert y.dtype == (jnp.float32 if widened else x.dtype)
    assert_within_bounds(y, x, w)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [129, 2600])
def test_a_row_does_not_depend_on_its_batch_mates(inputs: int, dtype: str) -> None:
    """To the last bit, for every number of rows that a register tile has, and beyond one chunk of rows."""
    x, w = operands(300, inputs, 40, dtype, seed=1)
    matrix = panels(w)
    every = np.asarray(multiply(matrix, x))
    for rows in (*range(1, 32), 100, 144, 145, 288, 289, 299):
        np.testing.assert_array_equal(np.asarray(multiply(matrix, x[-rows:])), every[-rows:], err_msg=f"{rows} rows")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_rows_that_are_wanted(dtype: str) -> None:
    x, w = operands(300, 70, 40, dtype, seed=4)
    matrix = panels(w)
    every = np.asarray(multiply(matrix, x))
    wanted = np.random.default_rng(5).permutation(np.r_[np.arange(0, 300, 2), np.full(90, -1)])
    limited = multiply(matrix, x, jnp.asarray(wanted))
    assert limited.shape == (240, 40)
    np.testing.assert_array_equal(np.asarray(limited)[wanted >= 0], every[wanted[wanted >= 0]])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [33, 1001])
def test_a_row_does_not_depend_on_how_many_are_wanted(inputs: int, dtype: str) -> None:
    """Nor on its place among them; one program serves every number."""
    x, w = operands(256, inputs, 40, dtype, seed=6)
    matrix, rng = panels(w), np.random.default_rng(7)
    every = np.asarray(multiply(matrix, x))
    for count in (*range(1, 70), 200, 255):
        wanted = rng.permutation(np.r_[rng.choice(256, count), np.full(256 - count, -1)]).astype(np.int32)
        y = np.asarray(multiply(matrix, x, jnp.asarray(wanted)))
        np.testing.assert_array_equal(y[wanted >= 0], every[wanted[wanted >= 0]], err_msg=f"{count} rows")


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 33, 70, 1001])
def test_what_follows_a_panel_is_not_read(inputs: int, dtype: str) -> None:
    """The next one's numbers may be none."""
    x, w = operands(20, inputs, 64, dtype, seed=8)
    broken = multiply(panels(w.at[16:].set(jnp.nan)), x)
    np.testing.assert_array_equal(np.asarray(broken)[:, :16], np.asarray(multiply(panels(w), x))[:, :16])


@pytest.mark.skipif(native.instruction_set() not in (AMX, AMX_EMULATED), reason="needs AMX, or its emulation")
def test_sums_of_amx_are_in_its_order() -> None:
    """Of each 32 products the even ones and the odd ones, from zero and in turn, then both onto what was there.

    Numbers near 1, whose products and sums float64 holds without rounding.
    """
    rng = np.random.default_rng(9)
    x, w = (jnp.asarray(rng.normal(size=(n, 96)), jnp.bfloat16) for n in (20, 40))
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    sums = np.zeros((20, 40), np.float32)
    for begin in range(0, 96, 32):
        halves = np.zeros((2, 20, 40), np.float32)
        for k in range(begin, begin + 32):
            halves[k % 2] = halves[k % 2] + np.multiply.outer(x64[:, k], w64[:, k])
        sums = sums + (halves[0] + halves[1])
    y = multiply(panels(w), x, out_dtype=jnp.dtype("float32"))
    np.testing.assert_array_equal(np.asarray(y), sums)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 100), st.integers(1, 100), st.sampled_from(DTYPES), st.sampled_from(GATES),
    st.integers(0, 999),
)  # fmt: skip
def test_gates(rows: int, inputs: int, outputs: int, dtype: str, gate: str, seed: int) -> None:
    """Against float64, for gates far from zero and near it."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inputs)) * rng.choice([0.01, 1, 30], (rows, 1)), dtype)
    w = jnp.asarray(rng.normal(size=(2, outputs, inputs)), dtype)
    y = multiply(panels(w, 2, gate), x, out_dtype=jnp.dtype("float32"))
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    (g, value), (g_error, value_error) = (x64 @ w64.mT, sum_errors(x64, w64))
    z = g if gate == "silu" else 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    activated = g / (1 + np.exp(-np.maximum(z, -700)))
    # Neither activation is steeper than 1.2.
    bound = 1.2 * g_error * (np.abs(value) + value_error) + np.abs(activated) * value_error
    bound += 1e-6 * np.abs(activated * value) + 1e-34
    np.testing.assert_array_less(np.abs(np.asarray(y) - activated * value), bound)


@needs_compiler
@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), st.integers(1, 60), st.integers(1, 40),
    st.sampled_from(DTYPES), st.sampled_from((None, "silu", "gelu")), st.integers(0, 999),
)  # fmt: skip
def test_groups_have_matrices_of_their_own(
    sizes: list[int], inputs: int, outputs: int, dtype: str, gate: str | None, seed: int
) -> None:
    """To the last bit what each would give alone, for a gate inside the product and one after it; rows left out too."""
    rng = np.random.default_rng(seed)
    shape = (len(sizes), inputs, outputs) if gate is None else (2, len(sizes), inputs, outputs)
    weight, x = jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(rng.normal(size=(9, inputs)), dtype)
    rows, groups = jnp.asarray(rng.integers(-1, 9, sum(sizes)), jnp.int32), jnp.asarray(sizes, jnp.int32)
    layout = MatrixLayout(gate=gate, is_grouped=True)
    grouped = PanelMatrix.of(weight.copy(), layout)
    y = product(grouped, x, rows, gate, groups)
    for group, end in enumerate(np.cumsum(sizes)):
        mine = slice(end - sizes[group], end)
        alone = PanelMatrix.of(weight[..., group, :, :].mT.copy(), MatrixLayout(1 if gate is None else 2, gate))
        wanted = np.asarray(rows[mine]) >= 0
        expected = np.asarray(product(alone, x, rows[mine], gate, None), np.float32)
        np.testing.assert_array_equal(np.asarray(y[mine], np.float32)[wanted], expected[wanted])


def product(
    matrix: PanelMatrix, x: jax.Array, rows: jax.Array, gate: str | None, groups: jax.Array | None
) -> jax.Array:
    if gate is None:
        return matrix.multiply(x, rows, groups=groups)
    return matrix.gated(x, rows, gate_of(gate), None, groups)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_no_numbers_stay_in_their_row(dtype: str) -> None:
    x, w = operands(20, 33, 20, dtype, seed=2)
    x = x.at[3, 5].set(jnp.nan).at[4, 32].set(jnp.inf)
    y = np.asarray(multiply(panels(w), x), np.float32)
    assert np.isnan(y[3]).all()
    assert np.isinf(y[4]).all()
    assert np.isfinite(np.delete(y, (3, 4), axis=0)).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_matrix(dtype: str) -> None:
    _, w = operands(1, 31, 50, dtype, seed=3)
    numbers = jnp.array([49, 0, 16, 15, 0])
    np.testing.assert_array_equal(panels(w).lookup(numbers), w[numbers])


@needs_compiler
def test_packing_replaces_the_matrices_and_keeps_the_order() -> None:
    weights = {"a": jnp.ones((2, 3, 8)), "b": jnp.ones(5), "c": jnp.ones((7, 2, 4))}
    kept = weights["b"]
    layouts = {"a": MatrixLayout(2), "c": MatrixLayout(1)}
    expected = list(abstract_taken(jax.eval_shape(lambda: weights), layouts, PanelMatrix).values())
    a, b, c = made = list(taken(weights, layouts, PanelMatrix).values())
    assert b is kept
    assert [name for name, weight in weights.items() if weight.is_deleted()] == ["a", "c"]
    assert (a.num_outputs, a.num_inputs, c.num_outputs, c.num_inputs) == (6, 8, 7, 8)
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda spec: spec.shape, expected)


def served(name: str, dtype: str, tokenizer: Path) -> list[int]:
    """The greedy tokens that an engine gives for a golden's prompt, in chunks with padding."""
    golden = Golden(name)
    with LLM(
        model=str(golden.checkpoint), tokenizer=str(tokenizer), show_progress=False, token_budget=16, max_num_seqs=2,
        block_size=8, num_blocks=24, max_model_len=golden.length, dtype=dtype,
    ) as llm:  # fmt: skip
        (output,) = llm.generate(
            [golden.prompt], SamplingParams(temperature=0, max_tokens=len(golden.greedy), ignore_eos=True)
        )
    return list(output.outputs[0].token_ids)


@needs_compiler
def test_an_engine_with_experts(tiny_tokenizer: Path) -> None:
    assert served("qwen3_moe_mixed", "float32", tiny_tokenizer) == Golden("qwen3_moe_mixed").greedy


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_engine_without_a_compiler(
    dtype: str,
    tiny_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says so once, and gives the tokens that transformers does, in bfloat16 nearly so."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    native.available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger=native.__name__):
            golden, tokens = Golden("llama_gqa_tied"), served("llama_gqa_tied", dtype, tiny_tokenizer)
    finally:
        native.available.cache_clear()
    (record,) = caplog.records
    assert "no C++ compiler found: attention and matrix products run in plain XLA" in record.message
    assert tokens == golden.greedy if dtype == "float32" else len(tokens) == len(golden.greedy)
