"""The capacity of a server: the highest request rate at which it meets an objective (arXiv 2403.02310, 5.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.config import option
from jaxserve.errors import ConfigError
from jaxserve.evaluation.latency import Objective, RunResult, RunSummary

GROWTH = 2.0
"""From one rate to the next while none has failed: an overloaded run is long, so rates come from below."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Where and how closely a capacity is searched. Raises ConfigError."""

    low: float = option(0.1, "lowest rate to try, requests per second")
    high: float = option(64.0, "highest rate to try")
    repeats: int = option(3, "trials at each rate, with different seeds; the majority decides")
    tolerance: float = option(0.05, "how far apart the rate that passes and the one that fails may be in the end")

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ConfigError(f"low must be above 0 and below high, got {self.low:g} and {self.high:g}")
        if self.repeats < 1 or self.repeats % 2 == 0:
            raise ConfigError(f"repeats must be odd and at least 1, since the majority decides, got {self.repeats}")
        if not 0 < self.tolerance <= 1:
            raise ConfigError(f"tolerance must be in (0, 1], got {self.tolerance:g}")


@dataclass(frozen=True)
class Trial:
    """One run at a rate."""

    rate: float
    seed: int
    passed: bool
    summary: RunSummary


@dataclass(frozen=True)
class CapacityResult:
    rate: float
    """The highest rate, in requests per second, at which most trials met the objective; 0 where none did."""
    converged: bool
    """Whether the next higher rate that failed is within the tolerance, and no trial contradicts."""
    reason: str
    """Why it did not converge, or how close it came."""
    trials: tuple[Trial, ...]
    """In the order of their runs."""

    def at(self, rate: float) -> list[Trial]:
        return [trial for trial in self.trials if trial.rate == rate]

    @property
    def rates(self) -> list[float]:
        """Those tried, from the lowest."""
        return sorted({trial.rate for trial in self.trials})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_capacity(
    measure: Callable[[float, int], RunResult],
    objective: Objective,
    *,
    low: float,
    high: float,
    repeats: int = 3,
    tolerance: float = 0.05,
    on_trial: Callable[[Trial], None] | None = None,
) -> CapacityResult:
    """Search the rates in [low, high] requests per second with ``measure(rate, seed)``.

    Up from ``low`` by doubling until a rate fails, then bisection of the rate's logarithm until the rate that passes
    and the one that fails differ by at most ``tolerance``, relative. A rate passes when most of ``repeats`` trials with
    the seeds 0, 1, ... meet the objective; those that can no longer change the majority are left out. A trial that
    passes above one that fails, further than the tolerance, is noise, and the search counts as not converged.
    ``on_trial`` sees each trial at once. Raises ConfigError.
    """
    SearchConfig(low=low, high=high, repeats=repeats, tolerance=tolerance)
    trials: list[Trial] = []

    def passes(rate: float) -> bool:
        votes = [0, 0]
        for seed in range(repeats):
            result = measure(rate, seed)
            trial = Trial(rate, seed, result.meets(objective), result.summary(objective))
            trials.append(trial)
            if on_trial is not None:
                on_trial(trial)
            votes[trial.passed] += 1
            if max(votes) > repeats // 2:
                break
        return votes[True] > votes[False]

    passing, failing = 0.0, math.inf
    rate = low
    while failing == math.inf and passing < high:
        if passes(rate):
            passing, rate = rate, min(rate * GROWTH, high)
        else:
            failing = rate
    if passing:
        while passing < high and failing / passing > 1 + tolerance:
            rate = math.sqrt(passing * failing)
            if passes(rate):
                passing = rate
            else:
                failing = rate
    converged, reason = _verdict(trials, passing, failing, tolerance)
    return CapacityResult(passing, converged, reason, tuple(trials))


def _verdict(trials: list[Trial], passing: float, failing: float, tolerance: float) -> tuple[bool, str]:
    if not passing:
        return False, f"the lowest rate, {failing:.3g}/s, already fails"
    if failing == math.inf:
        return False, f"the highest rate, {passing:.3g}/s, still passes"
    highest_pass = max(trial.rate for trial in trials if trial.passed)
    lowest_fail = min(trial.rate for trial in trials if not trial.passed)
    if highest_pass > lowest_fail * (1 + tolerance):
        return False, f"noise: a trial at {highest_pass:.3g}/s passes, one at {lowest_fail:.3g}/s fails"
    return True, f"{passing:.3g}/s passes, {failing:.3g}/s fails"
