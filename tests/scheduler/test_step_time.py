"""The step-time model: shapes count what attention reads, fits recover what made the samples, files keep it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler import Chunk
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.scheduler.step_time import (
    BatchShape,
    Profile,
    RelativeError,
    Sample,
    StepTimeModel,
    held_out_error,
    num_seen_keys,
)
from tests.scheduler.driver import make_request

BUCKETS = token_buckets(256)


@given(st.integers(0, 50), st.integers(1, 50), st.one_of(st.none(), st.integers(1, 60)))
def test_seen_keys(start: int, num_tokens: int, window: int | None) -> None:
    seen = (min(position + 1, window or position + 1) for position in range(start, start + num_tokens))
    assert num_seen_keys(start, num_tokens, window) == sum(seen)


def test_shape_of_a_batch() -> None:
    """A decode follows an output token; one token of a prompt, or of a recomputation, is a prefill chunk."""

    def chunk(start: int, num_tokens: int, prompt: int, *, samples: bool) -> Chunk:
        return Chunk(make_request(0, prompt, 9), start, num_tokens, slot=0, samples=samples)

    chunks = [
        chunk(9, 1, 7, samples=True),
        chunk(9, 1, 10, samples=True),
        chunk(9, 1, 7, samples=False),
        chunk(4, 20, 24, samples=True),
    ]
    pairs = 10 + 10 + sum(range(5, 25))
    shape = BatchShape.of(chunks, BUCKETS)
    assert shape == BatchShape(32, num_decodes=1, num_kv_tokens=10, num_prefill_tokens=22, num_pairs=pairs)
    assert BatchShape.of(chunks[:3], BUCKETS).with_chunk(4, 20, BUCKETS) == shape
    assert BatchShape.of(chunks, BUCKETS, window=3).num_kv_tokens == 3


@st.composite
def models(draw: st.DrawFn) -> StepTimeModel:
    bases = sorted(draw(st.lists(st.floats(1e-3, 1.0), min_size=len(BUCKETS), max_size=len(BUCKETS))))
    slope = st.one_of(st.just(0.0), st.floats(1e-8, 1e-5))
    return StepTimeModel(dict(zip(BUCKETS, bases, strict=True)), draw(slope), draw(slope))


def shapes(seed: int, count: int) -> list[BatchShape]:
    """Every bucket gets its share."""
    random = np.random.default_rng(seed)
    return [
        BatchShape(BUCKETS[i % len(BUCKETS)], 4, int(random.integers(0, 50_000)), 64, int(random.integers(0, 500_000)))
        for i in range(count)
    ]


@settings(max_examples=50, deadline=None)
@given(models(), st.integers(0, 2**31 - 1))
def test_fit_recovers_the_model(model: StepTimeModel, seed: int) -> None:
    samples = [Sample(shape, model.predict(shape)) for shape in shapes(seed, 60)]
    fitted = StepTimeModel.fit(samples)
    assert list(fitted.base_seconds) == list(BUCKETS)
    for rows, seconds in model.base_seconds.items():
        assert fitted.base_seconds[rows] == pytest.approx(seconds, rel=1e-6)
    assert fitted.seconds_per_kv_token == pytest.approx(model.seconds_per_kv_token, rel=1e-5, abs=1e-13)
    assert fitted.seconds_per_pair == pytest.approx(model.seconds_per_pair, rel=1e-5, abs=1e-13)
    assert held_out_error(samples).p90 < 1e-5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 10.0), min_size=30, max_size=30), st.integers(0, 9), st.data())
def test_a_fit_is_monotone_whatever_was_measured(seconds: list[float], seed: int, data: st.DataObject) -> None:
    """More rows, keys or pairs never take less time, also beyond the buckets that were measured."""
    model = StepTimeModel.fit([Sample(s, t) for s, t in zip(shapes(seed, 30), seconds, strict=True)])
    numbers = st.integers(0, 10**6)
    less = BatchShape(data.draw(st.integers(1, 1024)), 0, data.draw(numbers), 0, data.draw(numbers))
    for name in ("num_rows", "num_kv_tokens", "num_pairs"):
        more = dataclasses.replace(less, **{name: getattr(less, name) + data.draw(numbers)})
        assert model.predict(more) >= model.predict(less) >= 0


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(0, 2**31 - 1))
def test_held_out_error_is_about_the_noise(model: StepTimeModel, seed: int) -> None:
    """Noise of up to 10 % either way: 5 % at the median."""
    random = np.random.default_rng([seed, 1])
    samples = [Sample(shape, model.predict(shape) * random.uniform(0.9, 1.1)) for shape in shapes(seed, 200)]
    error = held_out_error(samples)
    assert 0.02 < error.median < error.p90 < 0.2
    assert error.median < 0.1


PROFILE = Profile(
    "smollm2-135m", "float32", "cpu", "2026-01-31", RelativeError(0.03, 0.1), StepTimeModel({16: 0.01}, 1e-7, 1e-8)
)


@given(models(), st.floats(0, 1))
def test_json_round_trip(model: StepTimeModel, error: float) -> None:
    profile = dataclasses.replace(PROFILE, step_time=model, error=RelativeError(error, error))
    assert Profile.from_json(profile.to_json()) == profile


@pytest.mark.parametrize(
    "change",
    [
        {"step_time": None},
        {"step_time": {"base_seconds": [[16, 1.0]], "seconds_per_pair": 0.0}},
        {"step_time": {"base_seconds": [], "seconds_per_kv_token": 0.0, "seconds_per_pair": 0.0}},
        {"step_time": {"base_seconds": [[16, "?"]], "seconds_per_kv_token": 0.0, "seconds_per_pair": 0.0}},
        {"error": {"mean": 1.0}},
        {"unknown": 1},
    ],
)
def test_a_file_that_is_no_profile(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not a profile|base_seconds|could not convert"):
        Profile.from_json(json.dumps(json.loads(PROFILE.to_json()) | change))
    with pytest.raises(ValueError, match="Expecting value"):
        Profile.from_json("no JSON")
