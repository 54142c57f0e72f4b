"""Offline inference, with vLLM's conventions: for notebooks and batches."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Mapping
from typing import Any, NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.engine.call_thread import CallThread
from jaxserve.engine.engine import Engine, clear
from jaxserve.errors import RequestError
from jaxserve.progress import progress_bar
from jaxserve.prompts import Message, ParsedPrompt, Prompt, parse_conversations, parse_prompts
from jaxserve.request import Completion, Logprob, RequestOutput, request_output
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel


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
        self._model = ServedModel.of(self.engine)
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
        asked = []
        for index, (prompt, params) in enumerate(zip(parsed, every, strict=True)):
            try:
                asked.append(self._asked(prompt, params))
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}") from error
        completions = [completion for one in asked for completion in one.completions]
        with progress_bar("generating", len(completions), "output", disable=not use_tqdm) as bar:
            self._calls.run(self._serve(completions), bar.update)
        return [request_output(one.request_id, one.completions, one.n) for one in asked]

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered with the model's chat template."""
        prompts = []
        for index, conversation in enumerate(parse_conversations(messages)):
            try:
                prompts.append(self._model.token_ids(ParsedPrompt(messages=conversation)))
            except RequestError as error:
                raise RequestError(f"conversations[{index}]: {error}") from error
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        for output in outputs:
            output.prompt = self.engine.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return outputs

    def score(
        self, prompts: Prompt | Iterable[Prompt], *, num_logprobs: int = 0, use_tqdm: bool = False
    ) -> list[list[Mapping[int, Logprob] | None]]:
        """Log-probability of every prompt token given those before it; the first entry is None.

        Each entry maps the prompt's token, and the ``num_logprobs`` likeliest ones, to a Logprob. A prompt may be as
        long as max_model_len.
        """
        params = SamplingParams(max_tokens=0, prompt_logprobs=num_logprobs)
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

    def _asked(self, prompt: ParsedPrompt, params: SamplingParams | None) -> _Asked:
        """The prompt's requests, checked, without output yet."""
        given = {} if params is None else vars(params)
        token_ids = self._model.token_ids(prompt, sampling=given)
        if params is None:
            params = self._model.sampling_params({}, len(token_ids))
        request_id = f"llm-{next(self._ids)}"
        completions = Completion.choices(request_id, token_ids, params, prompt.text)
        self.engine.validate(token_ids, completions[0].params)
        self.engine.grammar_of(params)
        return _Asked(request_id, params.n, completions)

    def _serve(self, completions: list[Completion]) -> Generator[int | None]:
        """Serve these requests, on the engine's thread; yields after every change, 1 for a request that has ended."""
        unfinished: dict[str, Completion] = {}
        try:
            for completion in completions:
                self.engine.add_request(completion.request_id, completion.prompt_token_ids, completion.params)
                unfinished[completion.request_id] = completion
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


class _Asked(NamedTuple):
    """One prompt of a call."""

    request_id: str
    n: int
    completions: list[Completion]


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
