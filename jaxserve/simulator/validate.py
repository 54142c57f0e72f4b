"""The simulator against a real engine: what bench.py capacity measured, predicted from a profile of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.evaluation.capacity import SearchConfig, find_capacity
from jaxserve.evaluation.latency import Objective, Percentiles
from jaxserve.evaluation.workload import WorkloadConfig, make_workload
from jaxserve.scheduler import Pace
from jaxserve.scheduler.step_time import Profile
from jaxserve.simulator.cost import FittedCost
from jaxserve.simulator.simulator import SimulatedRun, Simulator


class TrialPrediction(NamedTuple):
    rate: float
    measured_p99_tbt_seconds: float
    simulated_p99_tbt_seconds: float
    measured_delay_seconds: float
    """Median scheduling delay."""
    simulated_delay_seconds: float


@dataclass(frozen=True)
class PolicyPrediction:
    """A policy's capacity in requests per second, and each of its measured trials."""

    policy: str
    measured: float
    simulated: float
    trials: tuple[TrialPrediction, ...]

    @property
    def error(self) -> float:
        """Of the capacity, relative; infinite where the engine met the objective at no rate."""
        return self.simulated / self.measured - 1 if self.measured else math.inf


def predict(report: Mapping[str, Any], profile: Profile) -> list[PolicyPrediction]:
    """Simulate every policy of ``report``, the JSON of bench.py capacity, under its workload, objective and search."""
    settings = report["settings"]
    engine = EngineConfig(**settings["engine"])
    workload, search = WorkloadConfig(**settings["workload"]), SearchConfig(**settings["search"])
    objective = Objective(report["objective"]["p99_tbt_seconds"], report["objective"]["median_delay_seconds"])
    return [_predict_policy(series, engine, workload, search, objective, profile) for series in report["series"]]


def _predict_policy(
    series: Mapping[str, Any],
    engine: EngineConfig,
    workload: WorkloadConfig,
    search: SearchConfig,
    objective: Objective,
    profile: Profile,
) -> PolicyPrediction:
    def measure(rate: float, seed: int) -> SimulatedRun:
        asked = replace(workload, rate=rate, workload_seed=workload.workload_seed + seed)
        return _simulate(series["name"], engine, asked, profile)

    capacity = find_capacity(measure, objective, **vars(search))
    trials = []
    for trial in series["capacity"]["trials"]:
        simulated = measure(trial["rate"], trial["seed"]).summary()
        measured_tbt, measured_delay = (
            Percentiles(tuple(trial["summary"][name]["seconds"])) for name in ("tbt", "delay")
        )
        trials.append(
            TrialPrediction(
                trial["rate"], measured_tbt.at(99), simulated.tbt.at(99), measured_delay.at(50), simulated.delay.at(50)
            )
        )
    return PolicyPrediction(series["name"], series["capacity"]["rate"], capacity.rate, tuple(trials))


def _simulate(policy: str, engine: EngineConfig, workload: WorkloadConfig, profile: Profile) -> SimulatedRun:
    """An engine with those settings on a CPU, with as many KV blocks as its sequences can use."""
    assert engine.max_model_len is not None, "bench.py capacity settles it"
    config = engine.with_policy(policy).resolve(model_max_len=engine.max_model_len, on_gpu=False)
    slo = config.slo_tbt_seconds
    num_blocks = config.num_blocks or 1 + config.max_num_seqs * config.blocks_per_seq
    pace = Pace.of(slo, profile.step_time, profile.error) if slo else None
    simulator = Simulator(config.policy, config.limits(num_blocks, pace=pace), FittedCost(profile.step_time))
    return simulator.run(make_workload(workload, max_model_len=config.max_model_len))
