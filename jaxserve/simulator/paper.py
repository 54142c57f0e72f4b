"""The experiments of arXiv 2403.02310, simulated: what each deployment is, and what the paper reports of it.

Settings that the paper leaves open are those of its artifact, github.com/microsoft/sarathi-serve, osdi-experiments:
lengths of at most 8192 tokens in the chat workload and 16384 in the other, whatever the model's own limit; at most 128
requests at once, but 16 (Mistral-7B, Yi-34B) or 8 (the others) for Orca, "with higher batch size activation and kv
cache memory blows up"; Mistral-7B in version 0.2, which has no attention window; Azure NC96ads v4 machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from jaxserve.evaluation.capacity import CapacityResult, find_capacity
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.workload import WorkloadConfig, make_workload
from jaxserve.models.config import ModelConfig
from jaxserve.simulator.cost import RooflineCost, Tokens, authors_host_time, decodes
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.devices import A40_48G, A100_80G_PAIRS, Device
from jaxserve.simulator.simulator import SimulatedRun

MAX_TOKENS = {"openchat_sharegpt4": 8192, "arxiv_summarization": 16384}
"""Of a request, by workload."""
OBJECTIVES = ("strict", "relaxed")
BASELINES = {"prefill_first": "vLLM", "orca": "Orca"}
STRICT_BUDGET = 512


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One of the paper's four deployments."""

    model: str
    """A key of models/presets.py."""
    device: Device
    tensor: int
    pipeline: int
    strict_seconds: float
    """P99 TBT objective; the relaxed one is five times as long."""
    relaxed_budget: int
    orca_seqs: int
    low_rate: float
    """Requests per second from which to search capacities upwards."""
    trial_seconds: float
    """Of arrivals in a trial, several times as long as a request lives: a queue needs time to fill and to grow. (The
    median delay after t seconds is t / 2 (rate / capacity - 1), so rates pass that are too high by 4 s / t.)"""

    def objective(self, name: str) -> Objective:
        return Objective(self.strict_seconds * (1 if name == "strict" else 5))

    def budget(self, objective: str) -> int:
        return STRICT_BUDGET if objective == "strict" else self.relaxed_budget


MISTRAL = Setup(
    model="mistral-7b", device=A100_80G_PAIRS, tensor=1, pipeline=1,
    strict_seconds=0.1, relaxed_budget=2048, orca_seqs=16, low_rate=0.25, trial_seconds=120,
)  # fmt: skip
YI = Setup(
    model="yi-34b", device=A100_80G_PAIRS, tensor=2, pipeline=1,
    strict_seconds=0.2, relaxed_budget=2048, orca_seqs=16, low_rate=0.1, trial_seconds=180,
)  # fmt: skip
LLAMA = Setup(
    model="llama2-70b", device=A40_48G, tensor=4, pipeline=2,
    strict_seconds=1.0, relaxed_budget=1536, orca_seqs=8, low_rate=0.05, trial_seconds=300,
)  # fmt: skip
FALCON = Setup(
    model="falcon-180b", device=A100_80G_PAIRS, tensor=4, pipeline=2,
    strict_seconds=1.0, relaxed_budget=2048, orca_seqs=8, low_rate=0.05, trial_seconds=300,
)  # fmt: skip
SETUPS = (MISTRAL, YI, LLAMA, FALCON)


@dataclass(frozen=True)
class CapacityKey:
    model: str
    shape: str
    """As TP4-PP2."""
    workload: str
    objective: str
    policy: str
    extra_milliseconds: float
    """Of host time in every stage: a what-if."""


@dataclass
class Reproduction:
    """Runs the experiments; ``models`` are the shapes of the presets."""

    models: Mapping[str, ModelConfig]
    min_requests: int = 96
    """Of a trial where the rate is so low that fewer arrive; the paper's trials have 2048."""
    time_share: float = 1.0
    """Of each setup's ``trial_seconds``."""
    tolerance: float = 0.05
    """Of a capacity, relative."""
    log: Callable[[str], None] = print
    capacities: dict[CapacityKey, CapacityResult] = field(default_factory=dict)

    def deployment(
        self, setup: Setup, workload: str, policy: str, budget: int, *, tensor: int = 0, pipeline: int = 0
    ) -> Deployment:
        """``budget`` is sarathi's and chunked_only's; the others run whole prompts, as many as their limits let in."""
        length = MAX_TOKENS[workload]
        num_seqs = setup.orca_seqs if policy == "orca" else 128
        budgets = {"prefill_first": length, "hybrid_only": length, "orca": num_seqs * length}
        tensor, pipeline = tensor or setup.tensor, pipeline or setup.pipeline
        return Deployment(
            model=replace(self.models[setup.model], windows=()),
            device=setup.device,
            tensor=tensor,
            pipeline=pipeline,
            scheduler=policy,
            token_budget=budgets.get(policy, budget),
            max_num_seqs=num_seqs,
            max_model_len=length,
            host=authors_host_time(tensor),
        )

    def run(self, setup: Setup, deployment: Deployment, workload: str, rate: float, seed: int = 0) -> SimulatedRun:
        config = WorkloadConfig(
            lengths=workload,
            max_total_tokens=MAX_TOKENS[workload],
            rate=rate,
            num_requests=max(self.min_requests, round(rate * setup.trial_seconds * self.time_share)),
            workload_seed=seed,
        )
        return deployment.simulate(make_workload(config))

    def capacity(
        self,
        setup: Setup,
        workload: str,
        objective: str,
        policy: str,
        *,
        tensor: int = 0,
        pipeline: int = 0,
        extra_seconds: float = 0.0,
    ) -> float:
        """Requests per second; 0 where the lowest rate fails. Each is searched once."""
        deployment = self.deployment(setup, workload, policy, setup.budget(objective), tensor=tensor, pipeline=pipeline)
        host = replace(deployment.host, batch_seconds=deployment.host.batch_seconds + extra_seconds)
        deployment = replace(deployment, host=host)
        shape = f"TP{deployment.tensor}-PP{deployment.pipeline}"
        key = CapacityKey(setup.model, shape, workload, objective, policy, 1000 * extra_seconds)
        if key not in self.capacities:
            found = find_capacity(
                lambda rate, seed: self.run(setup, deployment, workload, rate, seed),
                setup.objective(objective),
                low=setup.low_rate,
                high=setup.low_rate * 512,
                repeats=1,
                tolerance=self.tolerance,
            )
            self.capacities[key] = found
            self.log(f"{setup.model} {shape} {workload} {objective} {policy}: {found.rate:.3g}/s ({found.reason})")
        return self.capacities[key].rate

    def cost(self, setup: Setup, *, tensor: int = 0, pipeline: int = 0) -> RooflineCost:
        return self.deployment(
            setup, "openchat_sharegpt4", "sarathi", STRICT_BUDGET, tensor=tensor, pipeline=pipeline
        ).roofline

    def decode_seconds(
        self, setup: Setup, *, tensor: int = 0, pipeline: int = 0, batch: int = 32, context: int = 4096
    ) -> list[float]:
        """A decode-only micro-batch in each stage."""
        return self.cost(setup, tensor=tensor, pipeline=pipeline).stage_seconds(decodes(batch, context))

    def prefill_seconds(self, setup: Setup, num_tokens: int, chunk: int) -> float:
        """A prompt alone, in chunks; all stages, one after the other."""
        cost, total = self.cost(setup), 0.0
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            total += sum(cost.stage_seconds([Tokens(start, stop - start, stop == num_tokens)]))
        return total

    def ablation(self, policy: str, budget: int, rate: float) -> tuple[float, float]:
        """Median TTFT and P99 TBT of Yi-34B on the chat workload."""
        chat = "openchat_sharegpt4"
        run = self.run(YI, self.deployment(YI, chat, policy, budget), chat, rate)
        return float(np.median(run.ttft_seconds)), float(np.percentile(run.tbt_seconds, 99))
