"""Which deployment serves most: capacities of several, and what each is like at the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.evaluation.capacity import find_capacity
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.workload import WorkloadConfig, make_workload
from jaxserve.scheduler import POLICIES
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.simulator import SimulatedRun


@dataclass(frozen=True)
class Candidate:
    """A deployment and what it sustains."""

    name: str
    deployment: Deployment
    requests_per_second: float
    """Its capacity; 0 where even the lowest rate tried is too much."""
    run: SimulatedRun
    """At that rate, or at the lowest one tried."""

    def replicas(self, requests_per_second: float) -> float:
        """How many serve that rate; infinite where one serves nothing."""
        if not self.requests_per_second:
            return math.inf
        return math.ceil(requests_per_second / self.requests_per_second)

    def queue_could_grow(self, objective: Objective) -> bool:
        """False where requests came for so short a time that even an endless queue would have met the objective.

        After t seconds of arrivals the median delay is t / 2 (rate / capacity - 1): 10 % too many show after 20 times
        the delay that is allowed.
        """
        arrivals = [request.arrival_seconds for request in self.run.requests]
        return max(arrivals) - min(arrivals) >= 20 * objective.median_delay_seconds

    @property
    def per_device(self) -> float:
        """Requests per second."""
        return self.requests_per_second / self.deployment.num_devices


def simulate(deployment: Deployment, config: WorkloadConfig, rate: float, seed: int = 0) -> SimulatedRun:
    config = replace(config, rate=rate, workload_seed=config.workload_seed + seed)
    return deployment.simulate(make_workload(config, max_model_len=deployment.max_model_len))


def rate_candidate(
    name: str,
    deployment: Deployment,
    config: WorkloadConfig,
    objective: Objective,
    *,
    low: float,
    high: float,
    tolerance: float = 0.05,
) -> Candidate:
    """Search the deployment's capacity between ``low`` and ``high`` requests per second. Raises ConfigError."""
    runs: dict[float, SimulatedRun] = {}

    def measure(rate: float, seed: int) -> SimulatedRun:
        runs[rate] = simulate(deployment, config, rate, seed)
        return runs[rate]

    found = find_capacity(measure, objective, low=low, high=high, repeats=1, tolerance=tolerance)
    return Candidate(name, deployment, found.rate, runs[found.rate or low])


def whole_prompts(deployment: Deployment, policy: str) -> Deployment:
    """The deployment with another policy, and with the budget that this policy can run with."""
    budget = deployment.token_budget
    if POLICIES[policy].runs_whole_prompts:
        budget = max(budget, deployment.max_model_len)
    return replace(deployment, scheduler=policy, token_budget=budget)


def variants(deployment: Deployment, sweep: str, budgets: Iterable[int]) -> dict[str, Deployment]:
    """What to compare, by name. ``sweep``: budgets, policies or shapes, the ways to divide as many devices.

    Shapes that the model or the devices' memory do not allow are left out. Raises ConfigError.
    """
    if sweep == "budgets":
        return {f"budget {budget}": replace(deployment, token_budget=budget) for budget in budgets}
    if sweep == "policies":
        has_step_times = deployment.pace is not None
        possible = [name for name, policy in POLICIES.items() if has_step_times or not policy.needs_step_times]
        return {name: whole_prompts(deployment, name) for name in possible}
    found: dict[str, Deployment] = {}
    for tensor in range(1, deployment.num_devices + 1):
        if deployment.num_devices % tensor == 0:
            pipeline = deployment.num_devices // tensor
            try:
                found[f"TP{tensor}-PP{pipeline}"] = replace(deployment, tensor=tensor, pipeline=pipeline)
            except ConfigError:
                continue
    return found


SWEEPS = ("budgets", "policies", "shapes")
COLUMNS: Mapping[str, Callable[[Candidate], str]] = {
    "requests/s": lambda c: f"{c.requests_per_second:.3g}",
    "per device": lambda c: f"{c.per_device:.3g}",
    "P50 TTFT s": lambda c: f"{c.run.summary().ttft.at(50):.3f}",
    "P50 TBT s": lambda c: f"{c.run.summary().tbt.at(50):.4f}",
    "P99 TBT s": lambda c: f"{c.run.summary().tbt.at(99):.4f}",
    "P50 TPOT s": lambda c: f"{np.median(c.run.tpot_seconds):.4f}",
    "cached": lambda c: f"{c.run.cached_share:.0%}",
    "stalls": lambda c: str(c.run.num_stalls),
    "busy": lambda c: f"{c.run.utilisation:.0%}",
    "bubbles": lambda c: f"{c.run.bubble_share:.1%}",
}


def plot(candidates: list[Candidate], objective: Objective, path: str) -> None:
    """Capacities as bars, and the TBT distribution of each at its capacity. Needs matplotlib."""
    from matplotlib import pyplot

    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    bars.bar([c.name for c in candidates], [c.requests_per_second for c in candidates])
    bars.set_ylabel("capacity, requests/s")
    bars.tick_params(axis="x", rotation=30)
    for candidate in candidates:
        gaps = sorted(candidate.run.tbt_seconds)
        curves.plot(gaps, [(i + 1) / len(gaps) for i in range(len(gaps))], label=candidate.name)
    curves.axvline(objective.p99_tbt_seconds, color="grey", linestyle="--", label="objective of P99")
    curves.set(xscale="log", xlabel="time between tokens at capacity, s", ylabel="share", ylim=(0.5, 1))
    curves.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
