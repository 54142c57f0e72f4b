"""Load and capacity of real engines: what bench.py serve and bench.py capacity do."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.config import EngineConfig, option
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import StepRecord
from jaxserve.errors import ConfigError
from jaxserve.evaluation.capacity import CapacityResult, SearchConfig, Trial, find_capacity
from jaxserve.evaluation.drafts import drafts_at
from jaxserve.evaluation.latency import Objective, RunResult
from jaxserve.evaluation.load import make_prompts, measure_engine, measure_server
from jaxserve.evaluation.report import Series
from jaxserve.evaluation.workload import WorkloadConfig, WorkloadRequest, make_workload
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.server.client import Client

DECODE_STEPS = 16
"""Steps whose median is the time of a decode step."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a server has to keep to. Raises ConfigError."""

    tbt_seconds: float | None = option(None, "P99 TBT to keep to, in seconds; tbt_multiple decode steps by default")
    tbt_multiple: float = option(5.0, "the same in decode steps of the engine: 5 is the paper's strict, 25 its relaxed")
    delay_seconds: float = option(2.0, "median scheduling delay to keep to")
    ttft_seconds: float | None = option(None, "TTFT that a request has to keep to for goodput; any by default")

    def __post_init__(self) -> None:
        for name in ("tbt_seconds", "tbt_multiple", "delay_seconds", "ttft_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value:g}")

    def objective(self, decode_step_seconds: float) -> Objective:
        return Objective(
            self.tbt_seconds or self.tbt_multiple * decode_step_seconds,
            self.delay_seconds,
            math.inf if self.ttft_seconds is None else self.ttft_seconds,
        )


def measure_decode_step(engine: Engine, context_tokens: int) -> float:
    """Median seconds of a step in which max_num_seqs requests decode at about ``context_tokens`` (paper: 32 at 4k).

    The context is shorter where the KV cache or max_model_len cannot hold it for all of them.
    """
    num_seqs = engine.config.max_num_seqs
    room = min(engine.blocks.num_free // num_seqs * engine.config.block_size, engine.max_model_len)
    # The first request decodes on while the last one's prompt is computed, beside at most num_seqs decodes a step.
    prefill_steps_per_token = num_seqs / (engine.config.token_budget - num_seqs + 1)
    longest = int((room - 2 * DECODE_STEPS) / (1 + prefill_steps_per_token))
    request = WorkloadRequest(0.0, max(1, min(context_tokens, longest)), 1)
    seconds: list[float] = []

    def observe(step: StepRecord, chunks: list[Chunk]) -> None:
        if step.num_tokens == step.num_decode_tokens == num_seqs:
            seconds.append(step.ready_seconds - step.device_start_seconds)

    forever = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for index, prompt in enumerate(make_prompts([request] * num_seqs, engine.model_config.vocab_size, seed=0)):
        engine.add_request(f"decode-{index}", prompt, forever)
    engine.on_step.append(observe)
    while engine.has_unfinished() and len(seconds) < DECODE_STEPS:
        engine.step()
    engine.on_step.remove(observe)
    for index in range(num_seqs):
        engine.abort(f"decode-{index}")
    while engine.has_unfinished():
        engine.step()
    if not seconds:
        raise ConfigError(f"max_num_seqs must be low enough for all of them to decode at once, got {num_seqs}")
    return statistics.median(seconds)


def run_engine(engine: Engine, workload: WorkloadConfig) -> RunResult:
    """The workload, cut to what the engine can hold, in this process."""
    requests = make_workload(workload, max_model_len=engine.max_model_len)
    return measure_engine(engine, requests, seed=workload.workload_seed, concurrency=_concurrency(workload))


def run_server(
    target: str, workload: WorkloadConfig, *, metrics_url: str | None = None, ready_timeout_seconds: float = 60.0
) -> RunResult:
    """The workload, cut to what the server can hold, over gRPC; ``metrics_url``: where it counts its drafts.

    Raises TimeoutError where no server is ready, and ConfigError where it has no metrics there.
    """
    with Client(target) as client:
        client.wait_ready(ready_timeout_seconds)
        info = client.model_info()
    requests = make_workload(workload, max_model_len=info.max_model_len)
    before = None if metrics_url is None else drafts_at(metrics_url)
    result = measure_server(
        target,
        requests,
        vocab_size=info.vocab_size,
        seed=workload.workload_seed,
        concurrency=_concurrency(workload),
    )
    if metrics_url is None or before is None:
        return result
    return dataclasses.replace(result, drafts=drafts_at(metrics_url).since(before))


def _concurrency(workload: WorkloadConfig) -> int | None:
    return workload.concurrency if workload.arrivals == "closed" else None


def search_engine(
    engine: Engine,
    workload: WorkloadConfig,
    search: SearchConfig,
    objective: Objective,
    on_trial: Callable[[str, Trial], None],
) -> tuple[CapacityResult, dict[float, RunResult]]:
    """The engine's capacity, and its run with the first seed at each rate."""
    first_runs: dict[float, RunResult] = {}

    def measure(rate: float, seed: int) -> RunResult:
        result = run_engine(
            engine, dataclasses.replace(workload, rate=rate, workload_seed=workload.workload_seed + seed)
        )
        first_runs.setdefault(rate, result)
        return result

    capacity = find_capacity(
        measure,
        objective,
        low=search.low,
        high=search.high,
        repeats=search.repeats,
        tolerance=search.tolerance,
        on_trial=lambda trial: on_trial(engine.config.scheduler, trial),
    )
    return capacity, first_runs


def compare_capacity(
    config: EngineConfig,
    policies: Sequence[str],
    workload: WorkloadConfig,
    search: SearchConfig,
    objective_config: ObjectiveConfig,
    *,
    on_trial: Callable[[str, Trial], None],
    on_objective: Callable[[Objective], None],
) -> tuple[Objective, list[Series]]:
    """The capacity of every policy on one workload, with one engine after the other.

    An objective in decode steps means those of the first policy. The runs that the report shows in detail are those
    with the first seed at the highest rate that every policy tried. Raises ConfigError.
    """
    if workload.arrivals == "closed":
        raise ConfigError("arrivals must have a rate for a search of capacity, got 'closed'")
    requests = make_workload(workload, max_model_len=config.max_model_len)
    context_tokens = int(statistics.median(r.num_prompt_tokens + r.num_output_tokens for r in requests))
    objective: Objective | None = None
    searches = []
    for policy_settings in [config.with_policy(policy) for policy in policies]:
        engine = Engine(policy_settings)
        if objective is None:
            seconds = 0.0 if objective_config.tbt_seconds else measure_decode_step(engine, context_tokens)
            objective = objective_config.objective(seconds)
            on_objective(objective)
        searches.append(search_engine(engine, workload, search, objective, on_trial))
        engine.close()
    assert objective is not None
    rate = max(set.intersection(*(set(first_runs) for _, first_runs in searches)))
    return objective, [
        Series(policy, first_runs[rate], rate, capacity)
        for policy, (capacity, first_runs) in zip(policies, searches, strict=True)
    ]
