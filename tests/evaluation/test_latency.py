"""A run's numbers against ones computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.latency import Objective, Percentiles, RunResult
from jaxserve.request import RequestMetrics


def make_result(**settings) -> RunResult:
    """Two requests in 4 seconds: one smooth, one with a gap of a second."""
    smooth = RequestMetrics(0.0, 0.5, [1.0, 1.1, 1.2, 1.3], 1.3)
    late = RequestMetrics(1.0, 2.5, [3.0, 4.0], 4.0, num_preemptions=1, num_stalls=2)
    return RunResult([smooth, late], **{"seconds": 4.0, "num_prompt_tokens": 100, "num_output_tokens": 6, **settings})


def test_the_numbers_of_a_run():
    result = make_result()
    assert result.ttft_seconds.tolist() == [1.0, 2.0]
    assert result.delay_seconds.tolist() == [0.5, 1.5]
    assert result.tbt_seconds == pytest.approx([0.1, 0.1, 0.1, 1.0])
    summary = result.summary(Objective(p99_tbt_seconds=0.2))
    assert (summary.num_requests, summary.num_failed) == (2, 0)
    assert (summary.num_stalls, summary.num_preemptions) == (2, 1)
    assert summary.requests_per_second == 0.5
    assert summary.output_tokens_per_second == 1.5
    assert summary.total_tokens_per_second == 26.5
    assert summary.goodput_requests_per_second == 0.25  # the smooth one
    assert summary.ttft.at(50) == 1.5
    assert summary.delay.at(50) == 1.0
    assert summary.tbt.at(99) == pytest.approx(0.1 + 0.97 * 0.9)  # rank 0.99 * 3 = 2.97, between 0.1 and 1.0
    assert summary.tbt.at(100) == pytest.approx(1.0)


def test_goodput_counts_requests_that_met_the_objective_themselves():
    result = make_result()
    assert result.goodput(Objective(p99_tbt_seconds=2.0)) == 0.5
    assert result.goodput(Objective(p99_tbt_seconds=2.0, ttft_seconds=1.5)) == 0.25
    assert result.goodput(Objective(p99_tbt_seconds=0.01)) == 0.0


@pytest.mark.parametrize(
    ("tbt", "delay", "met"), [(0.98, 1.0, True), (0.97, 1.0, False), (0.98, 0.99, False), (2.0, 2.0, True)]
)
def test_an_objective_bounds_p99_tbt_and_the_median_delay(tbt, delay, met):
    assert make_result().meets(Objective(p99_tbt_seconds=tbt, median_delay_seconds=delay)) is met


def test_failed_and_missing_requests_meet_no_objective():
    easy = Objective(p99_tbt_seconds=100.0, median_delay_seconds=100.0)
    assert make_result().meets(easy)
    assert not make_result(num_failed=1).meets(easy)
    assert not RunResult([], 1.0, 0, 0).meets(easy)


def test_outputs_of_one_token_have_no_tbt():
    result = RunResult([RequestMetrics(0.0, 0.5, [1.0], 1.0)], 1.0, 10, 1)
    assert result.meets(Objective(p99_tbt_seconds=0.001))
    assert result.goodput(Objective(p99_tbt_seconds=0.001)) == 1.0
    assert math.isnan(result.summary().tbt.at(99))
    assert result.summary().goodput_requests_per_second is None


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).exponential(size=1000)
    percentiles = Percentiles.of(values)
    for percent in (0, 50, 90, 99, 99.9, 100):
        assert percentiles.at(percent) == np.percentile(values, percent)


def test_json_holds_the_summary_and_every_request():
    data = make_result(errors=["UNAVAILABLE: gone"], num_failed=1, lag_seconds=[0.0, 0.1]).to_json()
    assert data["summary"]["num_failed"] == 1
    assert data["requests"][1]["token_seconds"] == [3.0, 4.0]
    assert data["errors"] == ["UNAVAILABLE: gone"]


@pytest.mark.parametrize("name", ["p99_tbt_seconds", "median_delay_seconds", "ttft_seconds"])
def test_wrong_objectives_are_named(name):
    with pytest.raises(ConfigError, match=f"{name} must be above 0, got 0"):
        Objective(**{"p99_tbt_seconds": 1.0, name: 0.0})
