"""Serving a workload on a virtual clock, by the engine's own scheduler and block manager."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxserve.errors import RequestError
from jaxserve.evaluation.latency import RunResult
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.request import FinishReason, Request, RequestMetrics, RequestStatus
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk, Limits, Scheduler
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.simulator.cost import CostModel
from jaxserve.simulator.pipeline import AsynchronousPipeline, Pipeline
from jaxserve.simulator.ticks import Tick, TickPipeline


@dataclass(frozen=True, kw_only=True)
class SimulatedRun(RunResult):
    """A run as users saw it, and what the devices did; one entry per pipeline stage."""

    num_batches: int
    busy_seconds: tuple[float, ...]
    bubble_seconds: tuple[float, ...]
    """Waiting in spite of work in the pipeline (Pipeline)."""
    bubble_share: float
    """Of the time in which the pipeline has work, the average stage's share of waiting."""
    loaded_bubble_share: float
    """The same until the last request has entered: without the end of the run, when ever fewer are left."""
    ticks: tuple[Tick, ...] = ()
    """Of stages in lock-step."""

    @property
    def utilisation(self) -> float:
        """Share of the run in which the average stage computes."""
        return sum(self.busy_seconds) / (self.seconds * len(self.busy_seconds))

    @property
    def cached_share(self) -> float:
        """Share of all prompt tokens that the prefix cache had."""
        return sum(request.num_cached_tokens for request in self.requests) / self.num_prompt_tokens


class Simulator:
    """One engine: a policy, a cost model, and a pipeline of as many micro-batches as the cost model has stages.

    A micro-batch enters when the first stage is free. The scheduler leaves out requests whose last token is still in
    flight, so the micro-batches' decodes are disjoint; consecutive chunks of a prompt may follow one another, since
    stages work in order. The clock moves from one event to the next: it costs nothing to wait.

    Stages in ``lock_step`` are those of our engine, others take a micro-batch whenever it is ready. ``copy_seconds``:
    what a block's way back from the swap space takes, which the micro-batch waits for. ``acceptance``: how likely a
    draft is to hold if those before it do, where the limits say that there are any.
    """

    def __init__(
        self,
        policy: type[Scheduler],
        limits: Limits,
        cost: CostModel,
        *,
        lock_step: bool = False,
        copy_seconds: float = 0.0,
        acceptance: float = 0.0,
    ) -> None:
        self._copy_seconds = copy_seconds
        self.scheduler = policy(replace(limits, pipeline_depth=cost.num_stages))
        self.pipeline: Pipeline[Chunk] = (
            TickPipeline(cost, token_buckets(limits.token_budget)) if lock_step else AsynchronousPipeline(cost)
        )
        self._acceptance, self._random = acceptance, random.Random(0)
        self._num_batches = 0
        self._loaded_bubble_share = 0.0

    def run(self, workload: Sequence[WorkloadRequest]) -> SimulatedRun:
        """Serve every request to its end. Raises RequestError for one that can never run."""
        arrivals = deque(self._request(index, asked) for index, asked in enumerate(workload))
        requests = list(arrivals)
        now = 0.0
        while arrivals or self.pipeline.leaving or self.scheduler.has_unfinished():
            now = self._next_event(now, arrivals)
            while arrivals and arrivals[0].metrics.arrival_seconds <= now:
                self.scheduler.add(arrivals.popleft())
            while self.pipeline.leaving and self.pipeline.leaving[0][0] <= now:
                self._process(*self.pipeline.leaving.popleft())
            self._launch(now)
        self.pipeline.idle_until(now)
        finished = [request.metrics.token_seconds[-1] for request in requests]
        return SimulatedRun(
            requests=[request.metrics for request in requests],
            seconds=max(finished) - min(request.metrics.arrival_seconds for request in requests),
            num_prompt_tokens=sum(request.num_prompt_tokens for request in requests),
            num_output_tokens=sum(len(request.output_token_ids) for request in requests),
            num_batches=self._num_batches,
            busy_seconds=tuple(self.pipeline.busy_seconds),
            bubble_seconds=tuple(self.pipeline.bubble_seconds),
            bubble_share=self.pipeline.bubble_share,
            loaded_bubble_share=self._loaded_bubble_share,
            ticks=tuple(self.pipeline.ticks) if isinstance(self.pipeline, TickPipeline) else (),
        )

    def _request(self, index: int, asked: WorkloadRequest) -> Request:
        blocks = self.scheduler.blocks
        capacity = (blocks.num_blocks - 1) * blocks.block_size
        num_tokens = asked.num_prompt_tokens + asked.num_output_tokens
        if num_tokens > self.scheduler.limits.max_model_len:
            raise RequestError(
                f"request {index} has {num_tokens} tokens, max_model_len is {self.scheduler.limits.max_model_len}"
            )
        if num_tokens > capacity and self.scheduler.limits.window is None:
            raise RequestError(f"request {index} needs {num_tokens} KV tokens, the device's memory holds {capacity}")
        own = asked.num_prompt_tokens - asked.num_shared_tokens
        return Request(
            request_id=str(index),
            prompt_token_ids=(-1 - asked.group,) * asked.num_shared_tokens + (index,) * own,
            params=SamplingParams(max_tokens=asked.num_output_tokens, ignore_eos=True),
            max_tokens=asked.num_output_tokens,
            metrics=RequestMetrics(asked.arrival_seconds),
            client=asked.client,
        )

    def _launch(self, now: float) -> None:
        """Let the scheduler's next micro-batch in, where the pipeline takes one."""
        if not self.pipeline.accepts(now):
            return
        chunks = list(self.scheduler.schedule().chunks.values())
        new = [chunk.request.metrics for chunk in chunks if chunk.request.metrics.first_scheduled_seconds is None]
        for metrics in new:
            metrics.first_scheduled_seconds = now
        # Copies out run beside the next steps.
        copied_seconds = self._copy_seconds * sum(not copy.is_out for copy in self.scheduler.blocks.take_copies())
        self.pipeline.enter(now + copied_seconds, chunks)
        self._num_batches += bool(chunks)
        if new:
            self._loaded_bubble_share = self.pipeline.bubble_share

    def _next_event(self, now: float, arrivals: deque[Request]) -> float:
        """The next time at which something may change."""
        events = [seconds for seconds in (self.pipeline.free_seconds[0],) if seconds > now]
        if self.pipeline.leaving:
            events.append(self.pipeline.leaving[0][0])
        if arrivals:
            events.append(arrivals[0].metrics.arrival_seconds)
        if not events:
            raise RuntimeError(f"{type(self.scheduler).__name__} schedules nothing, and nothing will change that")
        if not self.pipeline.has_work and not self.scheduler.has_unfinished():
            self.pipeline.idle_until(min(events))
        return min(events)

    def _process(self, now: float, chunks: Sequence[Chunk]) -> None:
        """A micro-batch has left the last stage: its tokens are there."""
        self.scheduler.sampled(chunks)
        for chunk in chunks:
            request = chunk.request
            if not chunk.samples or request.status is RequestStatus.FINISHED:
                continue
            num_held = 0
            while num_held < chunk.num_drafts and self._random.random() < self._acceptance:
                num_held += 1
            if chunk.num_drafts:
                self.scheduler.verified(chunk, chunk.num_drafts, num_held)
            num_tokens = min(1 + num_held, request.max_tokens - len(request.output_token_ids))
            request.output_token_ids += [int(request.request_id)] * num_tokens
            request.metrics.token_seconds += [now] * num_tokens
            if len(request.output_token_ids) == request.max_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH)
                request.metrics.finished_seconds = now
