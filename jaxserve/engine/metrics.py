"""Prometheus metrics of one engine: vLLM's names with our prefix, and what stall-free batching adds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxserve.engine.recent import Load, Recent
from jaxserve.engine.startup import StartupTimes
from jaxserve.request import Request, RequestMetrics
from jaxserve.scheduler import Chunk, Scheduler
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.scheduler.swap_space import Copy

_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 40, 80)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
_SHARE_BUCKETS = tuple(i / 10 for i in range(1, 11))
_ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LENGTH_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


@dataclass
class DraftCounts:
    """What became of a step's drafts."""

    num_sequences: int = 0
    """That had any."""
    num_rows: int = 0
    """For drafts, be they there or not."""
    num_verified: int = 0
    num_held: int = 0
    held: list[int] = field(default_factory=list)
    """By their place behind a sequence's last token, from 0 on."""

    @property
    def acceptance(self) -> float:
        """The share of drafts that held."""
        return self.num_held / max(1, self.num_verified)

    @property
    def wasted_share(self) -> float:
        """Of the rows, those that gained nothing."""
        return (self.num_rows - self.num_held) / max(1, self.num_rows)

    def add(self, num_rows: int, num_verified: int, num_held: int) -> None:
        """Those of one sequence."""
        self.num_sequences += num_verified > 0
        self.num_rows += num_rows
        self.num_verified += num_verified
        self.num_held += num_held
        self._hold([1] * num_held)

    def merge(self, other: DraftCounts) -> None:
        """Those of another step as well."""
        self.num_sequences += other.num_sequences
        self.num_rows += other.num_rows
        self.num_verified += other.num_verified
        self.num_held += other.num_held
        self._hold(other.held)

    def since(self, earlier: DraftCounts) -> DraftCounts:
        """What has come to ``earlier``."""
        return DraftCounts(
            self.num_sequences - earlier.num_sequences,
            self.num_rows - earlier.num_rows,
            self.num_verified - earlier.num_verified,
            self.num_held - earlier.num_held,
            [new - old for new, old in zip_longest(self.held, earlier.held, fillvalue=0)],
        )

    def _hold(self, more: Sequence[int]) -> None:
        self.held = [old + new for old, new in zip_longest(self.held, more, fillvalue=0)]


@dataclass
class StepRecord:
    """One step on the engine's clock, in seconds, and what it computed."""

    start_seconds: float = 0.0
    scheduled_seconds: float = 0.0
    launched_seconds: float = 0.0
    num_tokens: int = 0
    num_decode_tokens: int = 0
    """Tokens that follow an output token: decodes, and outputs recomputed after a preemption count as one chunk."""
    num_rows: int = 0
    """Rows of the program that ran: num_tokens and padding. Of a pipeline, when the step left it."""
    drafts: DraftCounts = field(default_factory=DraftCounts)
    device_start_seconds: float = 0.0
    """When the device could begin: at the launch, or at the end of the step before. Set, as what follows, later."""
    waited_seconds: float = 0.0
    """When the host began to wait for the results,"""
    ready_seconds: float = 0.0
    """when they were there,"""
    processed_seconds: float = 0.0
    """and when they had become deltas."""
    bubble_share: float | None = None
    """Of a pipeline, in the tick with which the step left it: the share of all stages' rows that had no token, because
    batches differ in size, there was none, or they do not fill the bucket. None without a pipeline."""


class _Histogram(Collector):
    """A histogram that one thread writes, so that it needs no lock: a third of what prometheus_client's own takes."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._bounds = [*buckets, math.inf]
        self._bound_array = np.array(self._bounds)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_all(self, values: np.ndarray) -> None:
        """The same, for values that come by the hundred."""
        found = np.bincount(np.searchsorted(self._bound_array, values), minlength=len(self._counts))
        self._counts = [old + new for old, new in zip(self._counts, found.tolist(), strict=True)]
        self._sum += float(values.sum())

    def collect(self) -> Iterator[Metric]:
        up_to = accumulate(self._counts)
        buckets = list(zip(map(floatToGoString, self._bounds), up_to, strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)


class EngineMetrics:
    """Metrics in a registry of their own, so that engines in one process do not mix; the latest of them in ``recent``.

    ``num_blocks``: KV blocks that requests can have.
    """

    def __init__(self, token_budget: int, num_blocks: int) -> None:
        self.registry = CollectorRegistry()
        self.recent = Recent(token_budget, num_blocks)
        self._token_budget = token_budget

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"jaxserve_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"jaxserve_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float] = _LATENCY_BUCKETS) -> _Histogram:
            return _Histogram(f"jaxserve_{name}", text, buckets, self.registry)

        self.running = gauge("num_requests_running", "Requests that hold a sequence slot")
        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self.compiles = gauge("compiles_after_warmup", "Programs compiled after warm-up: must stay 0")
        self.startup = gauge("startup_seconds", "Seconds of the start's phases; weights load beside compile", "phase")
        self.preemptions = counter("num_preemptions", "Requests that lost their KV blocks and were recomputed")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens of requests that have begun")
        self.prefix_hits = counter("prefix_cache_hits", "Those of them that the prefix cache had")
        self.swapped_out = counter("swapped_out_blocks", "KV blocks that were copied to the swap space")
        self.swapped_in = counter("swapped_in_blocks", "KV blocks that came back from there")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests")
        self.generation_tokens = counter("generation_tokens", "Output tokens of finished requests")
        self.finished = counter("request_success", "Finished requests", "finished_reason")
        self.stalls = counter("stalls", "Steps that left out a request that was ready to decode")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first output token")
        self.tbt = histogram("inter_token_latency_seconds", "Time between output tokens of one request (TBT)")
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last output token")
        self.queue = histogram("request_queue_time_seconds", "Scheduling delay: arrival to first batch")
        self.prefill = histogram("request_prefill_time_seconds", "First batch to first output token")
        self.decode = histogram("request_decode_time_seconds", "First to last output token")
        self.inference = histogram("request_inference_time_seconds", "First batch to last output token")
        self.mean_tbt = histogram(
            "request_time_per_output_token_seconds", "A request's mean time between its output tokens (TPOT)"
        )
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request", _LENGTH_BUCKETS)
        self.request_output = histogram("request_generation_tokens", "Output tokens of a request", _LENGTH_BUCKETS)
        self.max_tokens = histogram(
            "request_params_max_tokens", "Output tokens that a request may have at most", _LENGTH_BUCKETS
        )
        self.step_time = histogram("step_time_seconds", "Time that the device had a step to work on", _STEP_BUCKETS)
        self.step_tokens = counter("step_tokens", "Tokens computed by steps")
        self.iteration_tokens = histogram("iteration_tokens_total", "Tokens computed by a step", _ITERATION_BUCKETS)
        self.step_padding = counter("step_padding_tokens", "Padding rows computed by steps")
        self.draft_sequences = counter("spec_decode_num_drafts", "Times that a sequence had drafts in a step")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Drafts that steps verified")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Drafts that were the tokens which came")
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "The same, by their place behind the last token, from 0 on",
            "position",
        )
        self.wasted_rows = counter(
            "spec_decode_num_wasted_rows", "Rows for drafts that did not hold, or were not there"
        )
        self.budget_use = histogram("token_budget_use", "Share of the token budget a step used", _SHARE_BUCKETS)
        self.bubble = histogram(
            "pipeline_bubble_share",
            "Share of the stages' rows that had no token in a tick of the pipeline",
            _SHARE_BUCKETS,
        )

    def observe_startup(self, times: StartupTimes) -> None:
        for phase, seconds in times.phases.items():
            self.startup.labels(phase).set(seconds)

    def observe_copies(self, copies: Sequence[Copy]) -> None:
        num_out = sum(copy.is_out for copy in copies)
        self.swapped_out.inc(num_out)
        self.swapped_in.inc(len(copies) - num_out)

    def observe_queues(self, scheduler: Scheduler, num_held: int, blocks: BlockManager, num_compiles: int) -> None:
        """``num_held``: requests that wait outside of the scheduler."""
        load = Load(len(scheduler.running), len(scheduler.waiting) + num_held, blocks.num_used)
        self.recent.load = load
        self.running.set(load.num_running)
        self.waiting.set(load.num_waiting)
        self.kv_usage.set(blocks.usage)
        self.compiles.set(num_compiles)

    def observe_begin(self, request: Request) -> None:
        """Count a request that is in a batch for the first time."""
        self.prefix_queries.inc(request.num_prompt_tokens)
        self.prefix_hits.inc(request.metrics.num_cached_tokens)
        self.recent.add_prompt(request.num_prompt_tokens, request.metrics.num_cached_tokens)

    def observe_step(self, step: StepRecord, chunks: list[Chunk]) -> None:
        seconds, num_padding_tokens = step.ready_seconds - step.device_start_seconds, step.num_rows - step.num_tokens
        num_prefill_tokens = step.num_tokens - step.num_decode_tokens
        self.recent.add_step(step.num_decode_tokens, num_prefill_tokens, num_padding_tokens, seconds)
        self.step_time.observe(seconds)
        self.step_tokens.inc(step.num_tokens)
        self.iteration_tokens.observe(step.num_tokens)
        self.step_padding.inc(num_padding_tokens)
        self.budget_use.observe(step.num_tokens / self._token_budget)
        if step.drafts.num_rows:
            self._observe_drafts(step.drafts)
        if step.bubble_share is not None:
            self.bubble.observe(step.bubble_share)

    def _observe_drafts(self, drafts: DraftCounts) -> None:
        if drafts.num_verified:
            self.recent.add_drafts(drafts.num_verified, drafts.num_held)
        self.draft_sequences.inc(drafts.num_sequences)
        self.draft_tokens.inc(drafts.num_verified)
        self.accepted_tokens.inc(drafts.num_held)
        for place, number in enumerate(drafts.held):
            self.accepted_at.labels(str(place)).inc(number)
        self.wasted_rows.inc(drafts.num_rows - drafts.num_held)

    def observe_request(self, request: Request) -> None:
        """Count a request that has just ended."""
        times, num_output_tokens = request.metrics, len(request.output_token_ids)
        assert request.finish_reason is not None
        self.finished.labels(request.finish_reason.value).inc()
        self.prompt_tokens.inc(request.num_prompt_tokens)
        self.generation_tokens.inc(num_output_tokens)
        self.request_prompt.observe(request.num_prompt_tokens)
        self.request_output.observe(num_output_tokens)
        self.max_tokens.observe(request.max_tokens)
        self.stalls.inc(times.num_stalls)
        if times.first_scheduled_seconds is not None:
            self._observe_times(times, times.first_scheduled_seconds)

    def _observe_times(self, times: RequestMetrics, scheduled_seconds: float) -> None:
        self.queue.observe(scheduled_seconds - times.arrival_seconds)
        if not times.token_seconds:
            return
        first_seconds, last_seconds = times.token_seconds[0], times.token_seconds[-1]
        ttft_seconds, decode_seconds = first_seconds - times.arrival_seconds, last_seconds - first_seconds
        self.ttft.observe(ttft_seconds)
        self.e2e.observe(last_seconds - times.arrival_seconds)
        self.prefill.observe(first_seconds - scheduled_seconds)
        self.decode.observe(decode_seconds)
        self.inference.observe(last_seconds - scheduled_seconds)
        if len(times.token_seconds) > 1:
            self.mean_tbt.observe(decode_seconds / (len(times.token_seconds) - 1))
        tbt_seconds = np.array(times.tbt_seconds)
        self.tbt.observe_all(tbt_seconds)
        self.recent.add_request(ttft_seconds, tbt_seconds.tolist())
