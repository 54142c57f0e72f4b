"""Batches whose times can be told by hand, and what to run with them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.scheduler import POLICIES, Limits
from jaxserve.simulator.cost import CostModel, Span
from jaxserve.simulator.simulator import Simulator


class TokenCost:
    """Each stage takes a millisecond a row."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages

    def stage_seconds(self, spans: Iterable[Span], num_rows: int = 0) -> list[float]:
        return [1e-3 * max(num_rows, sum(span.num_tokens for span in spans))] * self.num_stages


def simulator_for(
    policy: str,
    cost: CostModel,
    *,
    budget: int,
    num_blocks: int = 1000,
    max_num_seqs: int = 16,
    lock_step: bool = False,
) -> Simulator:
    limits = Limits(
        token_budget=budget, max_num_seqs=max_num_seqs, max_model_len=700, num_blocks=num_blocks, block_size=8
    )
    return Simulator(POLICIES[policy], limits, cost, lock_step=lock_step)


def poisson(num_requests: int, rate: float, prompt: int = 100, output: int = 20) -> list[WorkloadRequest]:
    random = np.random.default_rng(0)
    arrivals = np.cumsum(random.exponential(1 / rate, num_requests))
    return [
        WorkloadRequest(float(at), int(random.integers(1, 2 * prompt)), int(random.integers(1, 2 * output)))
        for at in arrivals
    ]
