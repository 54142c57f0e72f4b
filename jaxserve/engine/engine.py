"""The engine: schedule a batch, launch it, process the one that left the device before, while it works."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.engine.batch import Packer, empty_step, prefills_of, prompt_targets, wants_prompt_logprobs
from jaxserve.engine.compile import CompileCounter
from jaxserve.engine.executor import Executor, prepare
from jaxserve.engine.metrics import EngineMetrics, StepRecord
from jaxserve.engine.output import OutputStream, collect_prompt_logprobs, host_logprobs, logprob_entry
from jaxserve.engine.profiling import Profiler, largest_budget, read_profile
from jaxserve.engine.programs import StepOutputs
from jaxserve.engine.runner import ModelRunner
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.engine.startup import StartupTimes
from jaxserve.engine.tracing import StepTracer
from jaxserve.errors import RequestError
from jaxserve.models.loading import generation
from jaxserve.models.loading.hub import resolve
from jaxserve.request import FinishReason, Logprob, Request, RequestDelta, RequestMetrics, RequestStatus, SamplingParams
from jaxserve.scheduler import Batch, Chunk, Pace
from jaxserve.scheduler.buckets import bubble_share
from jaxserve.scheduler.step_time import Profile
from jaxserve.sharding.mesh import make_mesh
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

HELD_POLL_SECONDS = 0.01
"""How long an idle engine may wait for programs before it looks for other requests."""


@dataclass
class _LaunchedStep:
    """A step whose last stage the device works on: without a pipeline, the step launched last."""

    chunks: list[Chunk]
    outputs: StepOutputs
    prompt_logprobs: TokenLogprobs[jax.Array] | None
    """Of the batch's rows, where a request asked for them."""
    record: StepRecord


class Engine:
    """Serves one model. One thread calls ``add_request``, ``abort`` and ``step``; ``validate`` may be called from any.

    Raises ConfigError and ModelError from the constructor, which loads, compiles and warms up. ``mesh``: by default of
    the first devices. ``make_executor``: a ``Leader`` where the mesh spans several processes. ``imports_seconds``: what
    the caller has spent on importing this, for ``startup``.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        mesh: Mesh | None = None,
        make_executor: Callable[..., Executor] = Executor,
        show_progress: bool = True,
        imports_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        started_seconds = time.monotonic()
        self._tracer = StepTracer(Path(config.trace)) if config.trace else None
        checkpoint, self.config = prepare(config)
        self.model_config = checkpoint.config
        stored = read_profile(config.profile, self.config) if config.profile is not None else None
        self.max_model_len = self.config.max_model_len
        self.tokenizer = (
            Tokenizer.from_folder(resolve(config.tokenizer)) if config.tokenizer else checkpoint.tokenizer()
        )
        self.eos_token_ids = checkpoint.eos_token_ids(self.tokenizer)
        self.sampling_defaults: Mapping[str, Any] = (
            checkpoint.sampling_defaults if config.generation_config == "auto" else {}
        )
        """The model's own, for fields that a request leaves open."""
        effective = SamplingParams(**self.sampling_defaults)
        logger.info(
            "sampling defaults: %s; of the model: %s",
            ", ".join(f"{name} {getattr(effective, name)}" for name in generation.FIELDS),
            ", ".join(self.sampling_defaults) or "none",
        )
        mesh = mesh or make_mesh(config.tensor_parallel, config.pipeline_parallel)
        executor = make_executor(self.config, checkpoint, mesh, show_progress=show_progress)
        self.runner = ModelRunner(executor)
        pace = self._settle_pace(stored, auto=config.token_budget == "auto") if config.needs_step_times else None
        self.scheduler = config.policy(
            self.config.limits(self.runner.num_blocks, window=self.model_config.window, pace=pace)
        )
        self.blocks = self.scheduler.blocks
        self._packer = Packer(self.blocks)
        self.metrics = EngineMetrics(self.config.token_budget)
        self.on_step: list[Callable[[StepRecord, list[Chunk]], None]] = [self.metrics.observe_step]
        """Called with every processed step and its chunks."""
        if self._tracer is not None:
            self.on_step.append(self._tracer.add)
        self._clock = clock
        self._random = np.random.default_rng(config.seed)
        self._streams: dict[str, OutputStream] = {}
        self._held: dict[str, Request] = {}
        """Requests for prompt logprobs that wait for the programs of those, where nobody queues behind them."""
        now = clock()
        self._in_stages: deque[tuple[list[Chunk], StepRecord]] = deque(
            ([], StepRecord(now, now, now, num_tokens=0, num_decode_tokens=0, num_rows=0))
            for _ in range(config.pipeline_parallel - 1)
        )
        """The steps that have not reached the last stage, the oldest first."""
        self._launched: _LaunchedStep | None = None
        self._device_free_seconds = -math.inf
        self._aborted: list[RequestDelta] = []
        self._closed = False
        self.compiles = CompileCounter()
        self.runner.prepare_scores()
        self.startup = StartupTimes(
            imports_seconds,
            executor.weights_seconds,
            executor.compile_seconds,
            executor.loading_seconds,
            self.runner.warm_up_seconds,
            imports_seconds + time.monotonic() - started_seconds,
        )
        self.metrics.observe_startup(self.startup)
        logger.info("%s", self.startup)
        if not config.warmup:
            logger.warning("no warm-up: steps stall while programs compile at their first use; for development only")

    def validate(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise RequestError, naming the field and the limit, if the request cannot be served."""
        vocab, limit = self.model_config.vocab_size, self.max_model_len
        if not prompt_token_ids:
            raise RequestError("prompt must hold at least one token, got none")
        room = limit - len(prompt_token_ids)
        only_scored = params.prompt_logprobs is not None and params.max_output_tokens(0) == 0
        if room < 0 or (room == 0 and not only_scored):
            raise RequestError(
                f"prompt of {len(prompt_token_ids)} tokens leaves no room for output: max_model_len is {limit}"
            )
        for name, token_ids in (("prompt", prompt_token_ids), ("stop_token_ids", params.stop_token_ids or ())):
            if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab):
                wrong = next(t for t in token_ids if not 0 <= t < vocab)
                raise RequestError(f"{name} holds token id {wrong}, outside the vocabulary [0, {vocab})")
        if params.max_output_tokens(room) > room:
            raise RequestError(
                f"max_tokens of {params.max_tokens} after a prompt of {len(prompt_token_ids)} tokens "
                f"exceeds max_model_len {limit}"
            )

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_seconds: float | None = None,
    ) -> None:
        """Queue a request. ``arrival_seconds`` is on the engine's clock, now by default. Raises RequestError, and
        RuntimeError once the engine is closed."""
        if self._closed:
            raise RuntimeError("the engine is closed")
        if request_id in self._streams:
            raise RequestError(f"request_id {request_id!r} is already in flight")
        self.validate(prompt_token_ids, params)
        eos = () if params.ignore_eos else self.eos_token_ids
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            max_tokens=params.max_output_tokens(self.max_model_len - len(prompt_token_ids)),
            metrics=RequestMetrics(self._clock() if arrival_seconds is None else arrival_seconds),
            stop_token_ids=frozenset((*(params.stop_token_ids or ()), *eos)),
            seed=params.seed if params.seed is not None else int(self._random.integers(2**31)),
        )
        self._streams[request_id] = OutputStream(request, self.tokenizer)
        if params.prompt_logprobs is None or self.runner.can_score():
            self.scheduler.add(request)
        else:
            self._held[request_id] = request

    def abort(self, request_id: str) -> bool:
        """End a request now: its blocks are free when this returns, and a last delta comes with the next step."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self._aborted.append(self._finish(stream, FinishReason.ABORT, text=stream.abort()))
        return True

    def has_unfinished(self) -> bool:
        return bool(self._streams or self._launched or self._aborted or self._has_steps_in_stages)

    @property
    def _has_steps_in_stages(self) -> bool:
        return any(chunks for chunks, _ in self._in_stages)

    def step(self) -> list[RequestDelta]:
        """Launch the next batch, then return what left the device before, a delta for each request served.

        The stages of a pipeline move on together, so where they have work and no batch is there, an empty one enters.
        """
        self._add_held()
        start = self._clock()
        batch = self.scheduler.schedule()
        self.metrics.preemptions.inc(len(batch.preempted))
        with self.compiles:
            working = batch.chunks or self._has_steps_in_stages
            launched = self._launch(batch, start) if working else None
        previous, self._launched = self._launched, launched
        deltas, self._aborted = self._aborted, []
        if previous is not None:
            deltas += self._process(previous)
        self.metrics.observe_queues(self.scheduler, len(self._held), self.blocks, self.compiles.count)
        return deltas

    def close(self) -> None:
        """Give the device's memory back and finish the trace; the engine cannot be used afterwards. A second time does
        nothing."""
        if self._closed:
            return
        self._closed = True
        self._launched = None
        self.runner.close()
        self.compiles.close()
        if self._tracer is not None:
            self._tracer.close()

    def _add_held(self) -> None:
        """Queue the requests that were held, once they can be served; until then an idle engine waits a little."""
        if not self._held:
            return
        idle = not (self.scheduler.has_unfinished() or self._launched or self._has_steps_in_stages)
        if self.runner.can_score(HELD_POLL_SECONDS if idle else 0.0):
            for request in self._held.values():
                self.scheduler.add(request)
            self._held.clear()

    def _settle_pace(self, stored: Profile | None, *, auto: bool) -> Pace:
        """The objective, and step times from the stored profile or measured now; an ``auto`` budget goes by them.

        Every bucket that could be the budget has been compiled; those above the one chosen go unused.
        """
        slo_tbt_seconds, profiler = self.config.slo_tbt_seconds, Profiler(self.runner)
        assert slo_tbt_seconds is not None, "checked by the configuration"
        profile = stored or profiler.profile(stop_seconds=slo_tbt_seconds)[0]
        if auto:
            budget = largest_budget(profile.step_time, profiler.worst_shapes(), slo_tbt_seconds)
            self.config = dataclasses.replace(self.config, token_budget=budget)
        logger.info(
            "step times of %s: held-out error %.1f %% (median), %.1f %% (P90); token budget %d",
            profile.date, 100 * profile.error.median, 100 * profile.error.p90, self.config.token_budget,
        )  # fmt: skip
        return Pace.of(slo_tbt_seconds, profile.step_time, profile.error)

    def _launch(self, batch: Batch, start: float) -> _LaunchedStep:
        """Launch a batch; returns the step that enters the last stage with it: without a pipeline, the batch itself."""
        scheduled = self._clock()
        chunks = list(batch.chunks.values())
        layout = self.runner.layout(batch.num_tokens)
        outputs = self.runner.launch(layout, self._packer.pack(layout, chunks) if chunks else empty_step(layout))
        prefills = prefills_of(chunks)
        for chunk in prefills:
            if chunk.request.metrics.first_scheduled_seconds is None:
                chunk.request.metrics.first_scheduled_seconds = scheduled
        record = StepRecord(
            start_seconds=start,
            scheduled_seconds=scheduled,
            launched_seconds=self._clock(),
            num_tokens=batch.num_tokens,
            num_decode_tokens=len(chunks) - len(prefills),
            num_rows=outputs.num_rows,
        )
        self._in_stages.append((chunks, record))
        return self._leave(outputs)

    def _leave(self, outputs: StepOutputs) -> _LaunchedStep:
        """The oldest step, whose outputs these are: the device works on its last stage."""
        num_rows = outputs.num_rows
        stage_tokens = [record.num_tokens for _, record in self._in_stages]
        chunks, record = self._in_stages.popleft()
        self.scheduler.sampled(chunks)
        prompt_logprobs = None
        if any(wants_prompt_logprobs(chunk) for chunk in prefills_of(chunks)):
            prompt_logprobs = self.runner.score(prompt_targets(num_rows, chunks))
        record.num_rows = num_rows
        record.device_start_seconds = self._clock()
        if len(stage_tokens) > 1:
            record.bubble_share = bubble_share(stage_tokens, num_rows)
        return _LaunchedStep(chunks, outputs, prompt_logprobs, record)

    def _process(self, step: _LaunchedStep) -> list[RequestDelta]:
        """Wait for a step's tokens and turn them into deltas."""
        waiting = self._clock()
        tokens = np.asarray(step.outputs.tokens)
        ready = self._clock()
        step.record.device_start_seconds = max(step.record.device_start_seconds, self._device_free_seconds)
        step.record.waited_seconds, step.record.ready_seconds = waiting, ready
        self._device_free_seconds = ready
        if step.prompt_logprobs is not None:
            collect_prompt_logprobs(step.chunks, host_logprobs(step.prompt_logprobs), self._streams)
        live = [
            (chunk.request, chunk.slot)
            for chunk in step.chunks
            if chunk.samples and chunk.request.status is not RequestStatus.FINISHED
        ]
        wants_logprobs = any(request.params.logprobs is not None for request, _ in live)
        logprobs = host_logprobs(step.outputs.logprobs) if wants_logprobs else None
        token_ids = tokens.tolist()
        deltas = [self._append(request, token_ids[slot], logprobs, slot, ready) for request, slot in live]
        step.record.processed_seconds = self._clock()
        for observe in self.on_step:
            observe(step.record, step.chunks)
        return deltas

    def _append(
        self, request: Request, token_id: int, logprobs: TokenLogprobs[np.ndarray] | None, slot: int, now: float
    ) -> RequestDelta:
        stream, params = self._streams[request.request_id], request.params
        prompt_logprobs = None
        if params.prompt_logprobs is not None and not request.output_token_ids:
            prompt_logprobs = stream.prompt_logprobs
        if request.max_tokens == 0:  # nothing but those was asked for
            return self._finish(stream, FinishReason.LENGTH, prompt_logprobs=prompt_logprobs)
        request.metrics.token_seconds.append(now)
        text, reason = stream.push(token_id)
        entry = None
        if params.logprobs is not None and logprobs is not None:
            entry = [logprob_entry(logprobs, slot, token_id, params.logprobs)]
        if reason is None:
            return stream.delta([token_id], text, entry, prompt_logprobs)
        return self._finish(stream, reason, [token_id], text, entry, prompt_logprobs)

    def _finish(
        self,
        stream: OutputStream,
        reason: FinishReason,
        token_ids: Sequence[int] = (),
        text: str = "",
        logprobs: list[dict[int, Logprob]] | None = None,
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None,
    ) -> RequestDelta:
        request = stream.request
        self._held.pop(request.request_id, None)
        self.scheduler.finish(request, reason)
        request.metrics.finished_seconds = self._clock()
        del self._streams[request.request_id]
        self.metrics.observe_request(request)
        return stream.delta(token_ids, text, logprobs, prompt_logprobs)


def clear(engine: Engine, request_ids: Iterable[str]) -> None:
    """Abort these requests, the last of the engine's, and step until nothing is left of them."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_unfinished():
        engine.step()
