"""What policies leave idle of a pipeline's stages, on the same requests (arXiv 2403.02310, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from jaxserve.errors import ConfigError
from jaxserve.evaluation.latency import RunSummary
from jaxserve.evaluation.workload import WorkloadConfig, make_workload
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.simulator import SimulatedRun
from jaxserve.simulator.sweep import whole_prompts
from jaxserve.simulator.ticks import Tick

DEFAULT = ("sarathi", "prefill_first", "orca")


@dataclass(frozen=True)
class Bubbles:
    """One policy's run, with stages in lock-step and with stages that move on each when it can.

    Idle time counts until the last request has entered: in the end ever fewer requests are left for the stages.
    """

    lock_step: SimulatedRun
    asynchronous: SimulatedRun

    @cached_property
    def ticks(self) -> list[Tick]:
        entered = max(request.first_scheduled_seconds or 0.0 for request in self.lock_step.requests)
        return [tick for tick in self.lock_step.ticks if tick.start_seconds <= entered]

    @cached_property
    def summary(self) -> RunSummary:
        """Of lock-step."""
        return self.lock_step.summary()

    def share(self, part: Callable[[Tick], float]) -> float:
        """Of all stages' time, in ticks."""
        return sum(map(part, self.ticks)) / sum(tick.seconds * len(tick.own_seconds) for tick in self.ticks)

    @property
    def idle_rows_share(self) -> float:
        """The mean of what the engine's metric jaxserve_pipeline_bubble_share observes, a value a tick."""
        return fmean(tick.bubble_share for tick in self.ticks)

    @property
    def idle_seconds_per_request(self) -> float:
        return sum(tick.idle_seconds for tick in self.ticks) / len(self.lock_step.requests)


def compare(deployment: Deployment, policies: Iterable[str], workload: WorkloadConfig) -> dict[str, Bubbles]:
    """By policy, at the workload's rate, each with a budget that it can run with. Raises ConfigError."""
    if deployment.pipeline < 2:
        raise ConfigError(f"pipeline must be at least 2 for its stages to wait, got {deployment.pipeline}")
    requests = make_workload(workload, max_model_len=deployment.max_model_len)
    compared = {policy: whole_prompts(deployment, policy) for policy in policies}
    return {
        policy: Bubbles(replace(variant, lock_step=True).simulate(requests), variant.simulate(requests))
        for policy, variant in compared.items()
    }


COLUMNS: Mapping[str, Callable[[Bubbles], str]] = {
    "ticks": lambda b: str(len(b.ticks)),
    "idle": lambda b: f"{b.share(lambda tick: tick.idle_seconds):.1%}",
    "padding": lambda b: f"{b.share(lambda tick: tick.padding_seconds):.1%}",
    "imbalance": lambda b: f"{b.share(lambda tick: tick.imbalance_seconds):.1%}",
    "no batch": lambda b: f"{b.share(lambda tick: tick.empty_seconds):.1%}",
    "idle rows": lambda b: f"{b.idle_rows_share:.1%}",
    "idle s/request": lambda b: f"{b.idle_seconds_per_request:.2f}",
    "P50 TBT s": lambda b: f"{b.summary.tbt.at(50):.4f}",
    "P99 TBT s": lambda b: f"{b.summary.tbt.at(99):.4f}",
    "delay s": lambda b: f"{b.summary.delay.at(50):.2f}",
    "tokens/s": lambda b: f"{b.summary.total_tokens_per_second:.0f}",
    "idle, async": lambda b: f"{b.asynchronous.loaded_bubble_share:.1%}",
    "P99 TBT s, async": lambda b: f"{b.asynchronous.summary().tbt.at(99):.4f}",
}
"""Those of the asynchronous pipeline are called so, the others are of lock-step."""
