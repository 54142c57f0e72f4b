"""Sampling on the device against numpy, in float64 and with sorts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine import sampler
from jaxserve.engine.sampler import SamplingInputs, TokenLogprobs, optional_logprobs, sample, token_logprobs

VOCAB = 64
SLACK = 1e-5
"""Relative room for float32 at the thresholds."""

jit_sample = jax.jit(sample)


def make_inputs(
    num_rows: int,
    *,
    temperature: float | np.ndarray = 1.0,
    top_p: float | np.ndarray = 1.0,
    min_p: float | np.ndarray = 0.0,
    top_k: int | np.ndarray = 0,
    seeds: int | np.ndarray = 0,
    positions: int | np.ndarray = 0,
) -> SamplingInputs:
    """One value for all rows, or an array of one each."""
    floats = [jnp.full(num_rows, value, jnp.float32) for value in (temperature, top_p, min_p)]
    ints = [jnp.full(num_rows, value, jnp.int32) for value in (top_k, seeds, positions)]
    return SamplingInputs(*floats, *ints)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def truncated(
    logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float, slack: float = 0.0
) -> np.ndarray:
    """``float64[V]``: the distribution to draw from. A positive slack keeps a token in doubt, a negative one drops it.

    In vLLM's order: temperature, min-p, top-k, top-p. Of tokens that are equal all are kept.
    """
    p = softmax(logits.astype(np.float64) / temperature)
    p = np.where(p >= min(1.0, min_p * (1 - slack)) * p.max(), p, 0.0)
    if top_k > 0:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0.0)
    p /= p.sum()
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        num_kept = min(np.searchsorted(np.cumsum(ordered), top_p + slack), len(p) - 1) + 1
        p = np.where(p >= ordered[num_kept - 1], p, 0.0)
    return p / p.sum()


def as_on_gpus(*operands: jax.Array, cpu: object, default: Callable[..., jax.Array]) -> jax.Array:
    """``jax.lax.platform_dependent``."""
    return default(*operands)


@pytest.fixture(scope="module", params=["all at once", "blocks first", "blocks first, as on GPUs"])
def kept(request: pytest.FixtureRequest) -> Callable[..., np.ndarray]:
    """Which tokens ``sample`` could draw, ``bool[V]``, found by drawing with noise of our own.

    Row v of V equal rows puts all noise on token v, so v is drawn if and only if no filter has dropped it.
    """
    abstract = [jax.ShapeDtypeStruct((VOCAB,), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((VOCAB,), jnp.int32)] * 3

    def all_on_one(position: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jnp.where(jnp.arange(shape[0]) == position, 1e9, 0.0).astype(dtype)

    with (
        mock.patch.object(jax.random, "fold_in", lambda key, position: position),
        mock.patch.object(jax.random, "gumbel", all_on_one),
        contextlib.ExitStack() as stack,
    ):
        if request.param != "all at once":
            stack.enter_context(mock.patch.multiple(sampler, SEARCH_BLOCK=5, SEARCH_BLOCKS=4))
        if request.param.endswith("GPUs"):
            stack.enter_context(mock.patch.object(jax.lax, "platform_dependent", as_on_gpus))
        program = (
            jax.jit(lambda *args: sample(*args))
            .lower(jax.ShapeDtypeStruct((VOCAB, VOCAB), jnp.float32), SamplingInputs(*abstract))
            .compile()
        )

    def kept(logits: np.ndarray, **parameters: float) -> np.ndarray:
        rows = jnp.asarray(np.tile(logits, (VOCAB, 1)))
        tokens = program(rows, make_inputs(VOCAB, positions=np.arange(VOCAB), **parameters))
        return np.asarray(tokens) == np.arange(VOCAB)

    return kept


@st.composite
def logits(draw: st.DrawFn) -> np.ndarray:
    """Flat to peaked, sometimes with many ties."""
    values = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=VOCAB) * draw(st.sampled_from([0.1, 1, 8]))
    if draw(st.booleans()):
        values = np.round(values * 2) / 2
    # Without -0.0: it equals 0.0 but sorts below it.
    return values.astype(np.float32) + 0.0


@settings(max_examples=300, deadline=None)
@given(
    logits(),
    st.sampled_from([0.25, 1.0, 2.0]),
    st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]),
    st.integers(-1, VOCAB + 5),
    st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
)
def test_kept_tokens(
    kept: Callable[..., np.ndarray], logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    found = kept(logits, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    fewest, most = (truncated(logits, temperature, min_p, top_k, top_p, slack) > 0 for slack in (-SLACK, SLACK))
    assert np.all(found >= fewest), "a token was dropped that belongs to the set"
    assert np.all(found <= most), "a token was kept that does not belong to the set"


@settings(max_examples=50, deadline=None)
@given(logits(), st.integers(1, VOCAB))
def test_top_k_keeps_k_and_what_equals_the_last(
    kept: Callable[..., np.ndarray], logits: np.ndarray, top_k: int
) -> None:
    assert np.array_equal(kept(logits, top_k=top_k), logits >= np.sort(logits)[-top_k])


def test_equal_logits_share_the_cut(kept: Callable[..., np.ndarray]) -> None:
    assert kept(np.zeros(VOCAB, np.float32), top_k=3, top_p=0.1).all()


def test_without_limits_every_token_is_kept(kept: Callable[..., np.ndarray]) -> None:
    values = np.linspace(-80, 80, VOCAB).astype(np.float32)
    for top_k in (0, -1, VOCAB, 2**31 - 1):
        assert kept(values, top_k=top_k).all()


def test_greedy_rows_take_the_first_maximum() -> None:
    values = np.random.default_rng(0).normal(size=(32, VOCAB)).astype(np.float32)
    values[3, [7, 40]] = 9.0
    # Limits do not matter to greedy rows.
    inputs = make_inputs(32, temperature=0.0, top_k=5, top_p=0.3, min_p=0.1, positions=np.arange(32))
    assert np.array_equal(jit_sample(values, inputs), values.argmax(axis=-1))


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}])
def test_the_tightest_limits_are_greedy(limits: dict[str, float]) -> None:
    values = np.random.default_rng(1).permuted(np.tile(np.linspace(-3, 3, VOCAB), (32, 1)), axis=1).astype(np.float32)
    inputs = make_inputs(32, positions=np.arange(32), **limits)
    assert np.array_equal(jit_sample(values, inputs), values.argmax(axis=-1))


@pytest.mark.parametrize("limits", [{"temperature": 2e-38}, {"temperature": 1e-40}, {"top_p": 1e-38}, {"min_p": 1.0}])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6, 3e37])
def test_the_tightest_limits_at_the_ends_of_float32_are_greedy(limits: dict[str, float], scale: float) -> None:
    """Numbers below 1.2e-38 are zero to the device, quotients and differences above 3.4e38 infinite."""
    values = np.random.default_rng(1).permuted(np.tile(np.linspace(-9, 9, VOCAB), (32, 1)), axis=1).astype(np.float32)
    values *= np.float32(scale)
    inputs = make_inputs(32, positions=np.arange(32), **limits)
    assert np.array_equal(jit_sample(values, inputs), values.argmax(axis=-1))


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_where_nothing_can_be_drawn_from_sampling_is_greedy(limits: dict[str, float], odd: float) -> None:
    """Infinite logits and what is not a number; other rows are drawn as ever."""
    values = np.random.default_rng(5).normal(size=(4, VOCAB)).astype(np.float32)
    broken = values.copy()
    broken[1, [20, 40]] = odd
    broken[3] = -np.inf
    inputs = make_inputs(4, positions=np.arange(4), **limits)
    found, expected = (np.asarray(jit_sample(logits, inputs)) for logits in (broken, values))
    assert found.tolist() == [expected[0], 20, expected[2], 0]


def test_tokens_ruled_out_by_minus_infinity_are_never_drawn() -> None:
    values = np.full((64, VOCAB), -np.inf, np.float32)
    values[:, [3, 50]] = [1.0, 1.5]
    for limits in ({}, {"top_k": 40}, {"top_p": 0.999}, {"temperature": 1e30}):
        drawn = np.asarray(jit_sample(values, make_inputs(64, positions=np.arange(64), **limits)))
        assert set(drawn.tolist()) == {3, 50}


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(50, 1.0), (127, 0.9), (3000, 1.0), (3000, 0.5), (0, 0.3), (0, 0.99)])
def test_draws_from_a_large_vocabulary(spread: float, top_k: int, top_p: float) -> None:
    """Token for token what a sort in float64 leaves of the same noise, be it in a few blocks or everywhere.

    Rows in which a token is within rounding of a limit, or a draw of the next, could go either way.
    """
    rng, rows, vocab = np.random.default_rng(6), 16, 20_000
    values = (rng.normal(size=(rows, vocab)) * spread).astype(np.float32)
    inputs = make_inputs(rows, temperature=0.8, top_k=top_k, top_p=top_p, seeds=3, positions=np.arange(rows))
    drawn = np.asarray(jit_sample(values, inputs))
    keys = jax.vmap(lambda position: jax.random.fold_in(jax.random.key(3), position))(np.arange(rows))
    noise = np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(keys), np.float64)
    num_checked = 0
    for row in range(rows):
        least, most = (truncated(values[row], 0.8, 0.0, top_k, top_p, slack) > 0 for slack in (-SLACK, SLACK))
        score = values[row].astype(np.float64) / 0.8 + noise[row]
        best, second = np.sort(np.where(most, score, -np.inf))[[-1, -2]]
        sure = least[np.where(most, score, -np.inf).argmax()] and not best - second < SLACK
        num_checked += sure
        assert not sure or drawn[row] == np.where(most, score, -np.inf).argmax()
    assert num_checked >= rows - 3


@pytest.mark.parametrize("varying", ["positions", "seeds"])
@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [
        (1.0, 0.0, 0, 1.0),
        (0.5, 0.0, 0, 1.0),
        (1.0, 0.05, 0, 1.0),
        (1.5, 0.0, 5, 1.0),
        (1.0, 0.0, 0, 0.7),
        (2.0, 0.1, 8, 0.8),
    ],
)
def test_frequencies(varying: str, temperature: float, min_p: float, top_k: int, top_p: float) -> None:
    """Draws over many positions, or seeds, follow the truncated softmax: Pearson's chi-square, five sigma."""
    num_draws = 20_000
    values = np.random.default_rng(2).normal(size=16).astype(np.float32)
    inputs = make_inputs(
        num_draws, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p,
        **({"seeds": 77, "positions": 9} | {varying: np.arange(num_draws)}),
    )  # fmt: skip
    draws = np.asarray(jit_sample(np.tile(values, (num_draws, 1)), inputs))
    counts = np.bincount(draws, minlength=len(values))
    expected = num_draws * truncated(values, temperature, min_p, top_k, top_p)
    assert not counts[expected == 0].any()
    expected, counts = expected[expected > 0], counts[expected > 0]
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbouring_draws_are_independent() -> None:
    """Seeds are small numbers and positions follow each other: neither may show in the draws."""
    seeds, positions = (grid.ravel() for grid in np.meshgrid(np.arange(100), np.arange(100)))
    draws = np.asarray(
        jit_sample(np.zeros((10_000, 4), np.float32), make_inputs(10_000, seeds=seeds, positions=positions))
    ).reshape(100, 100)
    for first, second in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        pairs = np.bincount((4 * first + second).ravel(), minlength=16)
        expected = first.size / 16
        assert ((pairs - expected) ** 2 / expected).sum() < 15 + 5 * np.sqrt(2 * 15)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_a_draw_depends_on_its_row_alone(seed: int) -> None:
    """Neither on the slot nor on what the other rows ask for."""
    rng = np.random.default_rng(seed)

    def batch() -> tuple[np.ndarray, SamplingInputs]:
        values = rng.normal(size=(8, VOCAB)).astype(np.float32)
        return values, make_inputs(
            8,
            temperature=rng.choice([0.0, 0.7, 1.5], 8),
            top_p=rng.choice([0.5, 1.0], 8),
            min_p=rng.choice([0.0, 0.1], 8),
            top_k=rng.choice([0, 4], 8),
            seeds=rng.integers(0, 2**31, 8),
            positions=rng.integers(0, 5000, 8),
        )

    (values, inputs), (others, other_inputs) = batch(), batch()
    tokens, order, mine = np.asarray(jit_sample(values, inputs)), rng.permutation(8), rng.random(8) < 0.5
    moved = jit_sample(values[order], jax.tree.map(lambda x: x[order], inputs))
    assert np.array_equal(moved, tokens[order])
    mixed = jax.tree.map(lambda x, y: jnp.where(mine, x, y), inputs, other_inputs)
    assert np.array_equal(np.asarray(jit_sample(np.where(mine[:, None], values, others), mixed))[mine], tokens[mine])


@settings(max_examples=50, deadline=None)
@given(logits(), st.integers(0, VOCAB - 1), st.sampled_from([1, 4]))
def test_logprobs(logits: np.ndarray, token: int, scale: int) -> None:
    logits = logits * np.float32(scale)
    found = jax.jit(partial(token_logprobs, 20))(logits[None], np.array([token]))
    expected = log_softmax(logits.astype(np.float64))
    order = np.argsort(-logits, kind="stable")[:20]
    tolerance = {"rtol": 1e-6, "atol": 1e-5}
    np.testing.assert_allclose(found.chosen[0], expected[token], **tolerance)
    assert found.rank[0] == 1 + (logits > logits[token]).sum()
    np.testing.assert_array_equal(found.top_ids[0], order)
    np.testing.assert_allclose(found.top[0], expected[order], **tolerance)


def test_logprobs_of_the_likeliest_are_bitwise_those_of_the_chosen() -> None:
    """Evaluation harnesses call an output greedy if its logprob equals the largest one exactly."""
    values = np.random.default_rng(3).normal(size=(64, 1000)).astype(np.float32) * 5
    found = jax.jit(partial(token_logprobs, 20))(values, values.argmax(axis=-1))
    assert np.array_equal(found.chosen, found.top[:, 0])


def test_all_of_a_vocabulary() -> None:
    found = token_logprobs(3, jnp.array([[0.0, 2.0, 1.0]]), jnp.array([2]))
    assert found.top_ids.tolist() == [[1, 2, 0]]
    assert found.rank.tolist() == [2]


@pytest.mark.parametrize("wanted", [False, True])
def test_optional_logprobs(wanted: bool) -> None:
    values, tokens = np.random.default_rng(4).normal(size=(2, VOCAB)).astype(np.float32), np.array([1, 2])
    found = jax.jit(optional_logprobs, static_argnums=1)(wanted, 20, values, tokens)
    expected: TokenLogprobs = token_logprobs(20, values, tokens)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(one, other if wanted else np.zeros_like(other), rtol=1e-6)
