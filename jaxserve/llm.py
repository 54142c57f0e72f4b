"""Offline inference, with vLLM's conventions: for notebooks and batches."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine.call_thread import CallThread
from jaxserve.engine.engine import Engine, clear
from jaxserve.errors import RequestError
from jaxserve.progress import progress_bar
from jaxserve.prompts import Message, ParsedPrompt, Prompt, parse_conversations, parse_prompts
from jaxserve.request import CompletionOutput, Logprob, RequestDelta, RequestOutput, SamplingParams, SoftLimit


class LLM:
    """A model in this process. Keyword arguments are those of EngineConfig; also a context manager.

    A call may be interrupted at any moment, as by a notebook's stop button: it ends with the step under way and leaves
    nothing behind. Calls from several threads are served one after the other. After ``close`` they raise RuntimeError.

    >>> with LLM(model="smollm2-135m", token_budget=256, max_num_seqs=16, max_model_len=2048) as llm:
    ...     outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
    """

    def __init__(self, model: str = "smollm2-135m", *, show_progress: bool = True, **config: Any) -> None:
        self.engine = Engine(EngineConfig(model=model, **config), show_progress=show_progress)
        self._calls = CallThread()
        """The only one that touches the engine, but for what does not change it."""
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt: text, token ids, TextPrompt or TokensPrompt; outputs come in the order of the prompts.

        Without sampling parameters those of ``get_default_sampling_params`` are taken. A max_tokens that is not the
        caller's is cut to what max_model_len leaves.
        Every prompt is checked before any is run: a bad one raises RequestError, naming it, and nothing is computed.
        """
        parsed = parse_prompts(prompts)
        every = _params_of_each(len(parsed), sampling_params)
        collectors = []
        for index, (prompt, params) in enumerate(zip(parsed, every, strict=True)):
            try:
                collectors.append(self._collector(prompt, params))
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}") from error
        with progress_bar("generating", len(collectors), "prompt", disable=not use_tqdm) as bar:
            self._calls.run(self._serve(collectors), bar.update)
        return [collector.output() for collector in collectors]

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered with the model's chat template."""
        tokenizer, prompts = self.engine.tokenizer, []
        for index, conversation in enumerate(parse_conversations(messages)):
            try:
                text = tokenizer.apply_chat_template(conversation)
            except RequestError as error:
                raise RequestError(f"conversations[{index}]: {error}") from error
            # The template writes the special tokens itself.
            prompts.append(tokenizer.encode(text, add_special_tokens=False))
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        for output in outputs:
            output.prompt = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return outputs

    def score(
        self, prompts: Prompt | Iterable[Prompt], *, num_logprobs: int = 0, use_tqdm: bool = False
    ) -> list[list[dict[int, Logprob] | None]]:
        """Log-probability of every prompt token given those before it; the first entry is None.

        Each entry maps the prompt's token, and the ``num_logprobs`` likeliest ones, to a Logprob. A prompt may be as
        long as max_model_len.
        """
        only_scored = SoftLimit(1)
        params = SamplingParams(temperature=0, max_tokens=only_scored, prompt_logprobs=num_logprobs, ignore_eos=True)
        outputs = self.generate(prompts, params, use_tqdm=use_tqdm)
        return [output.prompt_logprobs or [] for output in outputs]

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (unless generation_config is none), then those of SamplingParams."""
        return SamplingParams(**self.engine.sampling_defaults)

    def close(self) -> None:
        """Give the device's memory back, after the calls of other threads; a second time does nothing."""
        self._calls.run(self._close(), receive=lambda item: None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _collector(self, prompt: ParsedPrompt, params: SamplingParams | None) -> _Collector:
        engine, token_ids = self.engine, prompt.token_ids
        if token_ids is None:
            token_ids = engine.tokenizer.encode(prompt.text or "")
        if params is None:
            room = engine.max_model_len - len(token_ids)
            params = SamplingParams.with_defaults({}, engine.sampling_defaults, room)
        engine.validate(token_ids, params)
        return _Collector(f"llm-{next(self._ids)}", prompt.text, token_ids, params)

    def _serve(self, collectors: list[_Collector]) -> Generator[int | None]:
        """Serve these requests, on the engine's thread; yields after every change, 1 for a request that has ended."""
        unfinished: dict[str, _Collector] = {}
        try:
            for collector in collectors:
                self.engine.add_request(collector.request_id, collector.prompt_token_ids, collector.params)
                unfinished[collector.request_id] = collector
                yield None
            while unfinished:
                for delta in self.engine.step():
                    unfinished[delta.request_id].add(delta)
                    if delta.finish_reason is not None:
                        del unfinished[delta.request_id]
                        yield 1
                yield None
        finally:
            clear(self.engine, unfinished)

    def _close(self) -> Generator[None]:
        self.engine.close()
        yield


def _params_of_each(
    num_prompts: int, params: SamplingParams | Iterable[SamplingParams] | None
) -> list[SamplingParams | None]:
    """Those of each prompt, None for the model's own. Raises RequestError."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, Iterable) or isinstance(params, str | Mapping):
        raise RequestError(f"sampling_params must be SamplingParams or a list of them, got {params!r:.80}")
    every = list(params)
    for index, one in enumerate(every):
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params[{index}] must be SamplingParams, got {one!r:.80}")
    if len(every) != num_prompts:
        raise RequestError(f"sampling_params must be one or as many as prompts, got {len(every)} for {num_prompts}")
    return [*every]


class _Collector:
    """Builds one RequestOutput from its deltas."""

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        self.request_id, self.prompt, self.prompt_token_ids, self.params = request_id, prompt, prompt_token_ids, params
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._last: RequestDelta

    def add(self, delta: RequestDelta) -> None:
        self._token_ids += delta.token_ids
        self._text.append(delta.text)
        if self._logprobs is not None and delta.logprobs is not None:
            self._logprobs += delta.logprobs
        self._prompt_logprobs = delta.prompt_logprobs or self._prompt_logprobs
        self._last = delta

    def output(self) -> RequestOutput:
        """Once the last delta has been added."""
        total = None
        if self._logprobs is not None:
            total = sum(entry[token].logprob for entry, token in zip(self._logprobs, self._token_ids, strict=True))
        reason = self._last.finish_reason
        completion = CompletionOutput(
            index=0,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=total,
            logprobs=self._logprobs,
            finish_reason=None if reason is None else reason.value,
            stop_reason=self._last.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=[completion],
            finished=True,
            metrics=self._last.metrics,
        )
