"""What users saw of a run: TTFT, TBT, scheduling delay, throughput; and whether that meets an objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.request import RequestMetrics


@dataclass(frozen=True)
class Objective:
    """A rate is sustained while P99 TBT and the median scheduling delay stay within these (arXiv 2403.02310, 5.1)."""

    p99_tbt_seconds: float
    median_delay_seconds: float = 2.0


@dataclass(frozen=True)
class RunResult:
    """All requests of one run, finished; times on one clock, measured by a server or simulated."""

    requests: Sequence[RequestMetrics]
    seconds: float
    """From the first arrival to the last token."""
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def tbt_seconds(self) -> np.ndarray:
        """Times between consecutive output tokens of a request, of all requests."""
        return np.array([gap for request in self.requests for gap in request.tbt_seconds])

    @property
    def ttft_seconds(self) -> np.ndarray:
        """One for each request."""
        return np.array([request.ttft_seconds for request in self.requests], float)

    @property
    def delay_seconds(self) -> np.ndarray:
        """Scheduling delays, one for each request."""
        return np.array([request.scheduling_delay_seconds for request in self.requests], float)

    @property
    def num_stalls(self) -> int:
        return sum(request.num_stalls for request in self.requests)

    def meets(self, objective: Objective) -> bool:
        return (
            float(np.percentile(self.tbt_seconds, 99)) <= objective.p99_tbt_seconds
            and float(np.median(self.delay_seconds)) <= objective.median_delay_seconds
        )
