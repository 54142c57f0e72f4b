"""The search against servers whose capacity is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.capacity import find_capacity
from jaxserve.evaluation.latency import Objective, RunResult
from jaxserve.request import RequestMetrics

OBJECTIVE = Objective(p99_tbt_seconds=0.1, median_delay_seconds=2.0)


def run(delays: list[float], tbt: float = 0.05, num_failed: int = 0) -> RunResult:
    requests = [RequestMetrics(0.0, delay, [delay, delay + tbt]) for delay in delays]
    return RunResult(requests, 1.0, len(delays), 2 * len(delays), num_failed)


def sharp(limit: float):
    """A server that meets the objective up to a rate of ``limit``."""
    return lambda rate, seed: run([0.0], tbt=0.05 if rate <= limit else 0.5)


def queue(service_seconds: float, *, num_requests: int = 1000):
    """M/D/1: Poisson arrivals, one server, constant service; the waiting time is the scheduling delay (Lindley)."""

    def measure(rate: float, seed: int) -> RunResult:
        random = np.random.default_rng(seed)
        gaps = random.exponential(1 / rate, num_requests)
        waits, wait = [], 0.0
        for gap in gaps:
            wait = max(0.0, wait + service_seconds - gap)
            waits.append(wait)
        return run(waits)

    return measure


@pytest.mark.parametrize("limit", [1.0, 3.3, 7.9])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_a_sharp_limit_is_found_within_the_tolerance(limit, tolerance):
    result = find_capacity(sharp(limit), OBJECTIVE, low=0.5, high=16, tolerance=tolerance)
    assert result.converged, result.reason
    assert limit / (1 + tolerance) <= result.rate <= limit
    assert all(trial.passed == (trial.rate <= limit) for trial in result.trials)


def test_rates_double_from_the_lowest_and_overshoot_once():
    rates = []
    result = find_capacity(
        sharp(5.0), OBJECTIVE, low=1, high=1000, repeats=1, on_trial=lambda trial: rates.append(trial.rate)
    )
    assert rates[:4] == [1, 2, 4, 8]
    assert max(rates) == 8
    assert sorted(set(rates)) == result.rates
    assert [trial.rate for trial in result.trials] == rates


def test_an_mdone_queue_saturates_at_its_service_rate():
    """The median wait passes 2 s where the utilisation is near 1: service of 0.25 s gives 4 requests a second."""
    result = find_capacity(queue(0.25), OBJECTIVE, low=0.5, high=64, tolerance=0.05)
    assert 3.6 < result.rate < 4.2
    assert len(result.at(result.rate)) >= 2


def test_the_majority_decides_and_no_more_trials_run_than_it_needs():
    def one_bad_seed(rate: float, seed: int) -> RunResult:
        return run([0.0], tbt=0.5 if rate > 4 or seed == 1 else 0.05)

    result = find_capacity(one_bad_seed, OBJECTIVE, low=3, high=6, tolerance=0.5)
    assert result.rate == 3
    assert [(t.rate, t.seed) for t in result.trials] == [
        (3, 0),
        (3, 1),
        (3, 2),
        (6, 0),
        (6, 1),
        *((pytest.approx(math.sqrt(18)), seed) for seed in (0, 1)),
    ]


def test_noise_is_not_called_converged():
    random = np.random.default_rng(3)

    def noisy(rate: float, seed: int) -> RunResult:
        return run([0.0], tbt=0.1 * (rate / 4) * random.lognormal(0, 0.5))

    result = find_capacity(noisy, OBJECTIVE, low=0.5, high=64, repeats=5, tolerance=0.02)
    assert not result.converged
    assert "noise: a trial at" in result.reason
    assert 1.5 < result.rate < 9


def test_limits_out_of_the_range_are_told():
    slow = find_capacity(sharp(0.1), OBJECTIVE, low=1, high=8)
    assert (slow.rate, slow.converged, slow.reason) == (0, False, "the lowest rate, 1/s, already fails")
    fast = find_capacity(sharp(100), OBJECTIVE, low=1, high=10)
    assert (fast.rate, fast.converged, fast.reason) == (10, False, "the highest rate, 10/s, still passes")
    assert fast.rates == [1, 2, 4, 8, 10]


def test_a_server_that_refuses_requests_does_not_pass():
    result = find_capacity(lambda rate, seed: run([0.0], num_failed=int(rate > 3)), OBJECTIVE, low=1, high=8)
    assert 2.8 < result.rate <= 3


def test_json_holds_every_trial_with_percentiles():
    data = find_capacity(sharp(2.0), OBJECTIVE, low=1, high=8).to_json()
    assert data["converged"] is True
    assert data["trials"][0]["summary"]["tbt"]["seconds"][0] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.0}, "low must be above 0 and below high, got 0 and 8"),
        ({"low": 9.0}, "low must be above 0 and below high, got 9 and 8"),
        ({"repeats": 2}, "repeats must be odd and at least 1, since the majority decides, got 2"),
        ({"repeats": 0}, "repeats must be odd and at least 1, since the majority decides, got 0"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\], got 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        find_capacity(sharp(1), OBJECTIVE, **{"low": 1.0, "high": 8.0, **settings})
