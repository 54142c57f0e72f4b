"""The engine: schedule a batch, launch it, process the one that left the device before, while it works."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.engine.build import build
from jaxserve.engine.compile import CompileCounter
from jaxserve.engine.edits import EditedRequests
from jaxserve.engine.memory import return_freed_memory
from jaxserve.engine.metrics import EngineMetrics, StepRecord
from jaxserve.engine.output import OutputStream, collect_prompt_logprobs, drawn_tokens
from jaxserve.engine.runner import ModelRunner
from jaxserve.engine.step import Packer, Step, prefills_of, wants_prompt_logprobs
from jaxserve.engine.suggestions import Suggester
from jaxserve.engine.tracing import StepTracer, open_trace
from jaxserve.errors import RequestError
from jaxserve.grammars import Grammar, Grammars
from jaxserve.request import FinishReason, Request, RequestDelta, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Batch, Chunk
from jaxserve.structured_outputs import StructuredOutputsParams

HELD_POLL_SECONDS = 0.01
"""How long an idle engine may wait for programs before it looks for other requests."""


class Engine:
    """Serves one model. One thread calls ``add_request``, ``abort`` and ``step``; ``validate`` may be called from any.

    Raises ConfigError and ModelError from the constructor, which loads, compiles and warms up. ``mesh``: by default of
    the first devices. ``make_runner``: a ``Leader`` where the mesh spans several processes. ``imports_seconds``: what
    the caller has spent on importing this, for ``startup``.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        mesh: Mesh | None = None,
        make_runner: Callable[..., ModelRunner] = ModelRunner,
        show_progress: bool = True,
        imports_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracer = StepTracer(open_trace(config.trace)) if config.trace else None
        parts = build(config, mesh, make_runner, show_progress=show_progress, imports_seconds=imports_seconds)
        self.config, self.model_config = parts.config, parts.model_config
        self.max_model_len = parts.config.max_model_len
        self.tokenizer, self.eos_token_ids = parts.tokenizer, parts.eos_token_ids
        self.sampling_defaults = parts.sampling_defaults
        """The model's own, for fields that a request leaves open."""
        self.runner, self.scheduler, self.blocks = parts.runner, parts.scheduler, parts.scheduler.blocks
        self.startup = parts.startup
        self.metrics = EngineMetrics(self.config.token_budget, self.blocks.num_blocks - 1)
        self.metrics.observe_startup(self.startup)
        self.on_step: list[Callable[[StepRecord, list[Chunk]], None]] = [self.metrics.observe_step]
        """Called with every processed step and its chunks. Who looks on from another thread replaces the list."""
        if self._tracer is not None:
            self.on_step.append(self._tracer.add)
        self._clock, self._random = clock, np.random.default_rng(config.seed)
        self._packer = Packer(self.blocks)
        self._grammars = Grammars(self.tokenizer, self.model_config.vocab_size, self.eos_token_ids)
        self._edited = EditedRequests(self.runner.edits, self.tokenizer)
        self._suggester = Suggester(self.config, self._edited)
        self._streams: dict[str, OutputStream] = {}
        self._held: dict[str, Request] = {}
        """Requests that wait for rare programs, those of prompt logprobs and of edits; nobody queues behind them."""
        self._launched: Step | None = None
        """The step whose last stage the device works on: without a pipeline, the step launched last."""
        self._device_free_seconds = -math.inf
        self._ended: list[RequestDelta] = []
        self._closed = False
        self.compiles = CompileCounter()

    def validate(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise RequestError, naming the field and the limit, if the request cannot be served."""
        vocab, limit = self.model_config.vocab_size, self.max_model_len
        if params.num_choices > 1:
            raise RequestError(f"n and best_of must be 1 for a request of the engine, got {params.num_choices}")
        if not prompt_token_ids:
            raise RequestError("prompt must hold at least one token, got none")
        room = limit - len(prompt_token_ids)
        only_scored = params.prompt_logprobs is not None and params.max_output_tokens(0) == 0
        if room < 0 or (room == 0 and not only_scored):
            raise RequestError(
                f"prompt of {len(prompt_token_ids)} tokens leaves no room for output: max_model_len is {limit}"
            )
        for name, token_ids in (
            ("prompt", prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab):
                wrong = next(t for t in token_ids if not 0 <= t < vocab)
                raise RequestError(f"{name} holds token id {wrong}, outside the vocabulary [0, {vocab})")
        self._check_text(params)
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens of {params.min_tokens} after a prompt of {len(prompt_token_ids)} tokens "
                f"exceeds max_model_len {limit}"
            )
        if params.max_output_tokens(room) > room:
            raise RequestError(
                f"max_tokens of {params.max_tokens} after a prompt of {len(prompt_token_ids)} tokens "
                f"exceeds max_model_len {limit}"
            )

    def _check_text(self, params: SamplingParams) -> None:
        """Raise RequestError for what the engine has not been configured for, or the tokenizer cannot do."""
        limit, vocab = self.config.max_logprobs, self.model_config.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name) or 0
            if (vocab if asked == -1 else asked) > (vocab if limit == -1 else limit):
                raise RequestError(f"{name} of {asked} exceeds max_logprobs {limit}")
        if not params.spaces_between_special_tokens and self.tokenizer.spaces_special_tokens:
            raise RequestError("spaces_between_special_tokens must be True with this model's tokenizer, got False")

    def grammar_of(self, params: SamplingParams) -> Grammar | None:
        """What an output must be, compiled, if anything. May be called from any thread, and may take seconds. Raises
        RequestError."""
        structured = StructuredOutputsParams.of(params.structured_outputs)
        return None if structured is None else self._grammars.compile(structured)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_seconds: float | None = None,
        grammar: Grammar | None = None,
        client: str = "",
    ) -> None:
        """Queue a request. ``arrival_seconds`` is on the engine's clock, now by default. ``grammar``: of its structured
        outputs, where it has been compiled. ``client``: see Request. Raises RequestError, and RuntimeError once the
        engine is closed."""
        if self._closed:
            raise RuntimeError("the engine is closed")
        if request_id in self._streams:
            raise RequestError(f"request_id {request_id!r} is already in flight")
        self.validate(prompt_token_ids, params)
        grammar = grammar or self.grammar_of(params)
        eos = () if params.ignore_eos else self.eos_token_ids
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            max_tokens=params.max_output_tokens(self.max_model_len - len(prompt_token_ids)),
            metrics=RequestMetrics(self._clock() if arrival_seconds is None else arrival_seconds),
            stop_token_ids=frozenset((*(params.stop_token_ids or ()), *eos)),
            seed=params.seed if params.seed is not None else int(self._random.integers(2**31)),
            client=client,
        )
        self._streams[request_id] = OutputStream(request, self.tokenizer)
        self._edited.add(request, grammar)
        needs_rare = params.prompt_logprobs is not None or params.edits_logits
        if not needs_rare or self.runner.has_rare():
            self.scheduler.add(request)
        else:
            self._held[request_id] = request

    def abort(self, request_id: str) -> bool:
        """End a request now: its blocks are free when this returns, and a last delta comes with the next step."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        self._end(stream)
        return True

    def has_unfinished(self) -> bool:
        return bool(self._streams or self._launched or self._ended or self.runner.has_steps)

    def step(self) -> list[RequestDelta]:
        """Launch the next batch, then return what left the device before, a delta for each request served.

        The stages of a pipeline move on together, so where they have work and no batch is there, an empty one enters.
        """
        self._add_held()
        start = self._clock()
        batch = self.scheduler.schedule()
        self.metrics.preemptions.inc(len(batch.preempted))
        with self.compiles:
            self._copy_blocks()
            launched = self._launch(batch, start) if batch.chunks or self.runner.has_steps else None
        previous, self._launched = self._launched, launched
        deltas, self._ended = self._ended, []
        # Where edits depend on tokens that the host has yet to read, only the forward pass overlaps with reading them.
        waits = previous is not None and launched is not None and self._edited.needs_tokens(launched)
        if launched is not None and not waits:
            self._sample(launched)
        if previous is not None:
            deltas += self._process(previous)
        if launched is not None and waits:
            self._sample(launched)
        # Not before: what has just been sampled was masked behind the drafts that had been suggested.
        self._suggester.follow(() if launched is None else launched.chunks)
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
        return_freed_memory()

    def _add_held(self) -> None:
        """Queue the requests that were held, once they can be served; until then an idle engine waits a little."""
        if not self._held:
            return
        idle = not (self.scheduler.has_unfinished() or self._launched or self.runner.has_steps)
        if self.runner.has_rare(HELD_POLL_SECONDS if idle else 0.0):
            for request in self._held.values():
                self.scheduler.add(request)
            self._held.clear()

    def _copy_blocks(self) -> None:
        """Move what the scheduler wants moved between KV cache and swap space, before the step that needs it."""
        if copies := self.blocks.take_copies():
            self.runner.copy_blocks(copies)
            self.metrics.observe_copies(copies)

    def _launch(self, batch: Batch, start: float) -> Step:
        """Launch a batch; returns the step that enters the last stage with it."""
        scheduled = self._clock()
        step = self._pack(batch, start, scheduled) if batch.chunks else None
        entered = self.runner.launch(step)
        if step is not None:
            step.record.launched_seconds = self._clock()
        entered.record.device_start_seconds = self._clock()
        self.scheduler.sampled(entered.chunks)
        return entered

    def _sample(self, entered: Step) -> None:
        """Start to sample what has been launched last."""
        with self.compiles:
            edits, failed = self._edited.pack(entered, self.runner.num_draws(entered))
            self.runner.sample(entered, edits)
            if any(wants_prompt_logprobs(chunk) for chunk in prefills_of(entered.chunks)):
                entered.prompt_logprobs = self.runner.score(entered)
        for request, error in failed:
            self._end(self._streams[request.request_id], str(error))

    def _pack(self, batch: Batch, start: float, scheduled: float) -> Step:
        chunks = list(batch.chunks.values())
        step = self._packer.pack(self.runner.layout(batch.num_tokens), chunks)
        if (draft := self.runner.draft) is not None and (last_tokens := draft.following(chunks)):
            step.last_tokens = self._packer.pack(draft.layout, last_tokens).ints
        step.suggestions = self._suggester.pack(chunks)
        prefills = prefills_of(chunks)
        for chunk in prefills:
            if chunk.request.metrics.first_scheduled_seconds is None:
                chunk.request.metrics.first_scheduled_seconds = scheduled
                self.metrics.observe_begin(chunk.request)
        num_decodes = len(chunks) - len(prefills) + sum(chunk.num_drafts for chunk in chunks)
        step.record = StepRecord(start, scheduled, num_tokens=batch.num_tokens, num_decode_tokens=num_decodes)
        return step

    def _process(self, step: Step) -> list[RequestDelta]:
        """Wait for a step's tokens and turn them into deltas."""
        record = step.record
        record.waited_seconds = self._clock()
        token_ids = step.tokens()
        record.ready_seconds = self._clock()
        record.device_start_seconds = max(record.device_start_seconds, self._device_free_seconds)
        self._device_free_seconds = record.ready_seconds
        collect_prompt_logprobs(step, self._streams)
        deltas = []
        for drawn in drawn_tokens(step, token_ids):
            request = drawn.chunk.request
            stream = self._streams[request.request_id]
            if drawn.chunk.num_drafts:
                num_held = len(drawn.token_ids) - 1
                self.scheduler.verified(drawn.chunk, drawn.num_verified, num_held)
                record.drafts.add(drawn.chunk.num_drafts, drawn.num_verified, num_held)
            delta = stream.append(drawn.token_ids, drawn.logprobs, record.ready_seconds)
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._finish(request, delta.finish_reason)
                continue
            try:
                self._edited.accept(request, drawn.token_ids)
            except RequestError as error:
                self._end(stream, str(error))
        record.processed_seconds = self._clock()
        for observe in self.on_step:
            observe(record, step.chunks)
        return deltas

    def _end(self, stream: OutputStream, error: str | None = None) -> None:
        """End a request between steps: its last delta comes with the next one."""
        last = stream.end(error)
        assert last.finish_reason is not None
        self._finish(stream.request, last.finish_reason)
        self._ended.append(last)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._held.pop(request.request_id, None)
        self._edited.discard(request)
        self._suggester.discard(request)
        self.scheduler.finish(request, reason)
        request.metrics.finished_seconds = self._clock()
        del self._streams[request.request_id]
        self.metrics.observe_request(request)


def clear(engine: Engine, request_ids: Iterable[str]) -> None:
    """Abort these requests, the last of the engine's, and step until nothing is left of them."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_unfinished():
        engine.step()
