"""Runs a workload against a gRPC server, or against an engine in this process, on the real clock."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import StepRecord
from jaxserve.errors import RequestError
from jaxserve.evaluation.drafts import drafts_of
from jaxserve.evaluation.latency import RunResult
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.request import RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.server.client import AsyncClient
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

FIRST_TOKEN_ID = 1000
"""Many vocabularies keep control tokens below."""
LATE_SECONDS = 0.02
"""A generator whose P99 lag is longer has not made the load that was asked for."""
MAX_ERRORS = 10
"""Messages of failed requests that a result keeps."""


def make_prompts(workload: Sequence[WorkloadRequest], vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, so that prompts share no more than the workload has them share."""
    random = np.random.default_rng(seed)
    low = min(FIRST_TOKEN_ID, vocab_size // 2)
    prompts = []
    for request in workload:
        prompt = random.integers(low, vocab_size, request.num_prompt_tokens)
        if num_shared := request.num_shared_tokens:
            prompt[:num_shared] = np.random.default_rng((seed, request.group)).integers(low, vocab_size, num_shared)
        prompts.append(prompt.tolist())
    return prompts


@dataclass
class _Recorder:
    """Gathers a run's requests as they end."""

    started_seconds: float
    requests: list[RequestMetrics] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lag_seconds: list[float] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    num_prompt_tokens: int = 0

    def finish(self, metrics: RequestMetrics, num_prompt_tokens: int) -> None:
        self.requests.append(metrics)
        self.num_prompt_tokens += num_prompt_tokens

    def add_step(self, step: StepRecord, chunks: list[Chunk]) -> None:
        self.steps.append(step)

    def result(self) -> RunResult:
        if self.lag_seconds and (lag := float(np.percentile(self.lag_seconds, 99))) > LATE_SECONDS:
            logger.warning(
                "the load generator was late: P99 %.0f ms, at most %.0f ms; the load was not what was asked for",
                1000 * lag,
                1000 * max(self.lag_seconds),
            )
        if self.errors:
            logger.warning("%d requests failed; the first: %s", len(self.errors), self.errors[0])
        first = min((request.arrival_seconds for request in self.requests), default=self.started_seconds)
        last = max((request.token_seconds[-1] for request in self.requests), default=time.monotonic())
        return RunResult(
            requests=self.requests,
            seconds=last - first,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=sum(len(request.token_seconds) for request in self.requests),
            num_failed=len(self.errors),
            errors=self.errors[:MAX_ERRORS],
            lag_seconds=self.lag_seconds,
            steps=self.steps,
            drafts=drafts_of(self.steps) if self.steps else None,
        )


def measure_server(
    target: str,
    workload: Sequence[WorkloadRequest],
    *,
    vocab_size: int,
    seed: int = 0,
    concurrency: int | None = None,
    stop_seconds: float = math.inf,
) -> RunResult:
    """Send the workload to the server at ``target`` and measure tokens as they reach the client.

    Requests go out at their times whether or not earlier ones have ended (open loop), or with ``concurrency`` as soon
    as fewer are in flight (closed loop). They arrive when the plan says so: TTFT and scheduling delay hold the
    generator's own lag, on top of the delay that the server reports. A request that fails is counted and told. None
    is sent later than ``stop_seconds`` after the start.
    """
    prompts = make_prompts(workload, vocab_size, seed)
    return asyncio.run(_send_all(target, workload, prompts, concurrency, stop_seconds))


async def _send_all(
    target: str,
    workload: Sequence[WorkloadRequest],
    prompts: list[list[int]],
    concurrency: int | None,
    stop_seconds: float,
) -> RunResult:
    recorder = _Recorder(time.monotonic())
    slots = asyncio.Semaphore(concurrency or len(workload))
    async with AsyncClient(target) as client, asyncio.TaskGroup() as group:
        for request, prompt in zip(workload, prompts, strict=True):
            await slots.acquire()
            arrival_seconds = time.monotonic()
            if concurrency is None:
                arrival_seconds = recorder.started_seconds + request.arrival_seconds
                await asyncio.sleep(arrival_seconds - time.monotonic())
            if arrival_seconds > recorder.started_seconds + stop_seconds:
                break
            task = group.create_task(_send(client, request, prompt, arrival_seconds, recorder))
            task.add_done_callback(lambda _: slots.release())
    return recorder.result()


async def _send(
    client: AsyncClient, request: WorkloadRequest, prompt: list[int], arrival_seconds: float, recorder: _Recorder
) -> None:
    metrics = RequestMetrics(arrival_seconds)
    sent_seconds = time.monotonic()
    recorder.lag_seconds.append(sent_seconds - arrival_seconds)
    usage, end = pb.Usage(), "no finish reason"
    try:
        async for response in client.generate(
            prompt, max_tokens=request.num_output_tokens, ignore_eos=True, temperature=0.0
        ):
            metrics.token_seconds += [time.monotonic()] * len(response.token_ids)
            if response.finish_reason:
                usage, end = response.usage, pb.FinishReason.Name(response.finish_reason)
    except grpc.aio.AioRpcError as error:
        recorder.errors.append(f"{error.code().name}: {error.details()}")
        return
    if len(metrics.token_seconds) < request.num_output_tokens:
        made = len(metrics.token_seconds)
        recorder.errors.append(f"ended after {made} of {request.num_output_tokens} tokens: {end}")
        return
    metrics.finished_seconds = time.monotonic()
    if usage.HasField("scheduling_delay_seconds"):
        metrics.first_scheduled_seconds = sent_seconds + usage.scheduling_delay_seconds
    metrics.num_preemptions, metrics.num_stalls = usage.num_preemptions, usage.num_stalls
    recorder.finish(metrics, request.num_prompt_tokens)


def measure_engine(
    engine: Engine, workload: Sequence[WorkloadRequest], *, seed: int = 0, concurrency: int | None = None
) -> RunResult:
    """The same without gRPC, in this thread: requests that have arrived join between two steps of the engine.

    The engine's clock must be ``time.monotonic``, its default. The result holds its steps.
    """
    prompts = make_prompts(workload, engine.model_config.vocab_size, seed)
    recorder = _Recorder(time.monotonic())
    waiting = deque(enumerate(zip(workload, prompts, strict=True)))
    in_flight: set[str] = set()

    def next_arrival_seconds() -> float:
        return time.monotonic() if concurrency else recorder.started_seconds + waiting[0][1][0].arrival_seconds

    def add_next(arrival_seconds: float) -> None:
        index, (request, prompt) = waiting.popleft()
        params = SamplingParams(temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True)
        try:
            engine.add_request(f"load-{index}", prompt, params, arrival_seconds)
        except RequestError as error:
            recorder.errors.append(str(error))
        else:
            in_flight.add(f"load-{index}")

    engine.on_step.append(recorder.add_step)
    try:
        while waiting or engine.has_unfinished():
            while waiting and len(in_flight) < (concurrency or len(workload)):
                arrival_seconds = next_arrival_seconds()
                if arrival_seconds > time.monotonic():
                    break
                add_next(arrival_seconds)
            if engine.has_unfinished():
                for delta in engine.step():
                    if delta.finish_reason is not None:
                        in_flight.remove(delta.request_id)
                        recorder.finish(delta.metrics, delta.num_prompt_tokens)
            elif waiting:
                time.sleep(max(0.0, next_arrival_seconds() - time.monotonic()))
    finally:
        engine.on_step.remove(recorder.add_step)
    return recorder.result()
