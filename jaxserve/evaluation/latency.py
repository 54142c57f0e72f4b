"""What users saw of a run: TTFT, TBT, scheduling delay, throughput; and whether that meets an objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.request import RequestMetrics

if TYPE_CHECKING:
    from jaxserve.engine.metrics import DraftCounts, StepRecord

PERCENTS = (*range(100), 99.5, 99.9, 100)
"""Those that a ``Percentiles`` keeps: enough to draw a distribution."""


@dataclass(frozen=True)
class Objective:
    """A rate is sustained while P99 TBT and the median scheduling delay stay within these (arXiv 2403.02310, 5.1)."""

    p99_tbt_seconds: float
    median_delay_seconds: float = 2.0
    ttft_seconds: float = math.inf
    """Of a single request, for goodput alone."""

    def __post_init__(self) -> None:
        for name in ("p99_tbt_seconds", "median_delay_seconds", "ttft_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")

    def met_by(self, request: RequestMetrics) -> bool:
        """Whether this request alone had its first token and 99 % of its other ones in time."""
        ttft_seconds = request.ttft_seconds
        in_time = ttft_seconds is not None and ttft_seconds <= self.ttft_seconds
        tbt = request.tbt_seconds
        return in_time and (not tbt or float(np.percentile(tbt, 99)) <= self.p99_tbt_seconds)


@dataclass(frozen=True)
class Percentiles:
    """A distribution of seconds by its values at ``PERCENTS``; all NaN where there was nothing to measure."""

    seconds: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> Percentiles:
        return cls(tuple(np.percentile(values, PERCENTS).tolist() if len(values) else [math.nan] * len(PERCENTS)))

    def at(self, percent: float) -> float:
        return self.seconds[PERCENTS.index(percent)]


@dataclass(frozen=True)
class RunSummary:
    """A run in a few hundred numbers, however many tokens it had."""

    num_requests: int
    """Finished ones."""
    num_failed: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    goodput_requests_per_second: float | None
    """None without an objective."""
    num_stalls: int
    num_preemptions: int
    ttft: Percentiles
    tbt: Percentiles
    delay: Percentiles


@dataclass(frozen=True)
class RunResult:
    """All requests of one run, finished; times on one clock, measured by a server or simulated."""

    requests: Sequence[RequestMetrics]
    seconds: float
    """From the first arrival to the last token."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_failed: int = 0
    """Requests that were refused or broke off; they are not among ``requests``."""
    errors: Sequence[str] = ()
    """Why the first ones failed."""
    lag_seconds: Sequence[float] = ()
    """How much later than planned each request was sent."""
    steps: Sequence[StepRecord] = ()
    """The engine's steps, where it ran in this process."""
    drafts: DraftCounts | None = None
    """What became of them, where somebody has counted."""

    @cached_property
    def tbt_seconds(self) -> np.ndarray:
        """Times between consecutive output tokens of a request, of all requests."""
        return np.array([gap for request in self.requests for gap in request.tbt_seconds])

    @cached_property
    def ttft_seconds(self) -> np.ndarray:
        """One for each request."""
        return np.array([request.ttft_seconds for request in self.requests], float)

    @cached_property
    def delay_seconds(self) -> np.ndarray:
        """Scheduling delays, one for each request."""
        return np.array([request.scheduling_delay_seconds for request in self.requests], float)

    @cached_property
    def tpot_seconds(self) -> np.ndarray:
        """A request's mean time for each output token after the first, of requests that have several."""
        times = [request.token_seconds for request in self.requests if len(request.token_seconds) > 1]
        return np.array([(seconds[-1] - seconds[0]) / (len(seconds) - 1) for seconds in times])

    @property
    def num_stalls(self) -> int:
        return sum(request.num_stalls for request in self.requests)

    @property
    def num_preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.requests)

    def meets(self, objective: Objective) -> bool:
        """Outputs of one token have no TBT, which then meets any objective; a failed request meets none."""
        if self.num_failed or not self.requests:
            return False
        tbt = self.tbt_seconds
        return (not len(tbt) or float(np.percentile(tbt, 99)) <= objective.p99_tbt_seconds) and float(
            np.median(self.delay_seconds)
        ) <= objective.median_delay_seconds

    def goodput(self, objective: Objective) -> float:
        """Requests per second that met the objective themselves."""
        return sum(map(objective.met_by, self.requests)) / self.seconds

    def summary(self, objective: Objective | None = None) -> RunSummary:
        return RunSummary(
            num_requests=len(self.requests),
            num_failed=self.num_failed,
            seconds=self.seconds,
            requests_per_second=len(self.requests) / self.seconds,
            output_tokens_per_second=self.num_output_tokens / self.seconds,
            total_tokens_per_second=(self.num_prompt_tokens + self.num_output_tokens) / self.seconds,
            goodput_requests_per_second=None if objective is None else self.goodput(objective),
            num_stalls=self.num_stalls,
            num_preemptions=self.num_preemptions,
            ttft=Percentiles.of(self.ttft_seconds),
            tbt=Percentiles.of(self.tbt_seconds),
            delay=Percentiles.of(self.delay_seconds),
        )

    def to_json(self, objective: Objective | None = None) -> dict[str, Any]:
        """The summary, and every request's and step's times."""
        return {
            "summary": asdict(self.summary(objective)),
            "drafts": None if self.drafts is None else asdict(self.drafts),
            "errors": list(self.errors),
            "lag_seconds": list(self.lag_seconds),
            "requests": [asdict(request) for request in self.requests],
            "steps": [asdict(step) for step in self.steps],
        }
