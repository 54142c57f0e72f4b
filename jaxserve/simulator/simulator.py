"""Serving a workload on a virtual clock, by the engine's own scheduler and block manager."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.evaluation.latency import RunResult
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.request import FinishReason, Request, RequestError, RequestMetrics, RequestStatus, SamplingParams
from jaxserve.scheduler import Batch, Scheduler
from jaxserve.simulator.cost import CostModel
from jaxserve.simulator.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class SimulatedRun(RunResult):
    """A run as users saw it, and what the devices did; one entry per pipeline stage."""

    num_batches: int
    busy_seconds: tuple[float, ...]
    bubble_seconds: tuple[float, ...]
    """Waiting in spite of work in the pipeline (Pipeline)."""

    @property
    def utilisation(self) -> float:
        """Share of the run in which the average stage computes."""
        return sum(self.busy_seconds) / (self.seconds * len(self.busy_seconds))

    @property
    def bubble_share(self) -> float:
        """Of the time in which the pipeline has work, the average stage's share of waiting."""
        return sum(self.bubble_seconds) / (sum(self.busy_seconds) + sum(self.bubble_seconds))


class Simulator:
    """One engine: a scheduler, a cost model, and a pipeline of as many micro-batches as the model has stages.

    A micro-batch enters when the first stage is free. The scheduler leaves out requests whose last token is still in
    flight, so the micro-batches' decodes are disjoint; consecutive chunks of a prompt may follow one another, since
    stages work in order. The clock moves from one event to the next: it costs nothing to wait.
    """

    def __init__(self, scheduler: Scheduler, cost: CostModel) -> None:
        self.scheduler = scheduler
        self.scheduler.pipeline_depth = cost.num_stages
        self.cost = cost
        self.pipeline = Pipeline(cost.num_stages)
        self._in_flight: deque[tuple[float, Batch]] = deque()
        """When each micro-batch leaves the last stage, in order of entry."""
        self._num_batches = 0

    def run(self, workload: Sequence[WorkloadRequest]) -> SimulatedRun:
        """Serve every request to its end. Raises RequestError for one that can never run."""
        arrivals = deque(self._request(index, asked) for index, asked in enumerate(workload))
        requests = list(arrivals)
        now = 0.0
        while arrivals or self._in_flight or self.scheduler.has_unfinished():
            now = self._next_event(now, arrivals)
            while arrivals and arrivals[0].metrics.arrival_seconds <= now:
                self.scheduler.add(arrivals.popleft())
            while self._in_flight and self._in_flight[0][0] <= now:
                self._process(*self._in_flight.popleft())
            self._launch(now)
        finished = [request.metrics.token_seconds[-1] for request in requests]
        return SimulatedRun(
            requests=[request.metrics for request in requests],
            seconds=max(finished) - min(request.metrics.arrival_seconds for request in requests),
            num_prompt_tokens=sum(request.num_prompt_tokens for request in requests),
            num_output_tokens=sum(len(request.output_token_ids) for request in requests),
            num_batches=self._num_batches,
            busy_seconds=tuple(self.pipeline.busy_seconds),
            bubble_seconds=tuple(self.pipeline.bubble_seconds),
        )

    def _request(self, index: int, asked: WorkloadRequest) -> Request:
        blocks = self.scheduler.blocks
        capacity = (blocks.num_blocks - 1) * blocks.block_size
        num_tokens = asked.num_prompt_tokens + asked.num_output_tokens
        if num_tokens > self.scheduler.max_model_len:
            raise RequestError(
                f"request {index} has {num_tokens} tokens, max_model_len is {self.scheduler.max_model_len}"
            )
        if num_tokens > capacity and self.scheduler.window is None:
            raise RequestError(f"request {index} needs {num_tokens} KV tokens, the device's memory holds {capacity}")
        return Request(
            request_id=str(index),
            prompt_token_ids=[0] * asked.num_prompt_tokens,
            params=SamplingParams(max_tokens=asked.num_output_tokens, ignore_eos=True),
            max_tokens=asked.num_output_tokens,
            metrics=RequestMetrics(asked.arrival_seconds),
        )

    def _launch(self, now: float) -> None:
        """Let a micro-batch in, if the first stage is free, one may follow, and the scheduler has something to do."""
        if self.pipeline.free_seconds[0] > now or len(self._in_flight) == self.pipeline.num_stages:
            return
        batch = self.scheduler.schedule()
        chunks = batch.chunks.values()
        if not chunks:
            return
        for chunk in chunks:
            if chunk.request.metrics.first_scheduled_seconds is None:
                chunk.request.metrics.first_scheduled_seconds = now
        self._in_flight.append((self.pipeline.enter(now, self.cost.stage_seconds(chunks)), batch))
        self._num_batches += 1

    def _next_event(self, now: float, arrivals: deque[Request]) -> float:
        """The next time at which something may change."""
        events = [seconds for seconds in (self.pipeline.free_seconds[0],) if seconds > now]
        if self._in_flight:
            events.append(self._in_flight[0][0])
        if arrivals:
            events.append(arrivals[0].metrics.arrival_seconds)
        if not events:
            raise RuntimeError(f"{type(self.scheduler).__name__} schedules nothing, and nothing will change that")
        if not self._in_flight and not self.scheduler.has_unfinished():
            self.pipeline.idle_until(min(events))
        return min(events)

    def _process(self, now: float, batch: Batch) -> None:
        """A micro-batch has left the last stage: its tokens are there."""
        self.scheduler.sampled(batch.chunks.values())
        for chunk in batch.chunks.values():
            request = chunk.request
            if not chunk.samples or request.status is RequestStatus.FINISHED:
                continue
            request.num_pending_tokens -= 1
            request.output_token_ids.append(0)
            request.metrics.token_seconds.append(now)
            if len(request.output_token_ids) == request.max_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH)
                request.metrics.finished_seconds = now
