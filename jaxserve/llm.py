"""Offline inference, with vLLM's conventions: for notebooks and batches."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxserve.beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, next_token
from jaxserve.config import EngineConfig
from jaxserve.engine.call_thread import CallThread
from jaxserve.engine.engine import Engine, clear
from jaxserve.errors import RequestError, naming
from jaxserve.grammars import Grammar
from jaxserve.html_view import RequestOutputs
from jaxserve.openai.tools import check_tools
from jaxserve.progress import progress_bar
from jaxserve.prompts import Message, ParsedPrompt, Prompt, parse_conversations, parse_prompts
from jaxserve.request import Completion, Logprob, request_output
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel
from jaxserve.tokenizer import Tokenizer


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
        priority: Iterable[int] | None = None,
    ) -> RequestOutputs:
        """Continue each prompt: text, token ids, TextPrompt or TokensPrompt; outputs come in the order of the prompts.

        Without sampling parameters those of ``get_default_sampling_params`` are taken. A max_tokens that is not the
        caller's is cut to what max_model_len leaves. ``priority``: one for each prompt, instead of its parameters'.
        Every prompt is checked before any is run: a bad one raises RequestError, naming it, and nothing is computed.
        """
        parsed = parse_prompts(prompts)
        every = _params_of_each(len(parsed), sampling_params)
        return self._outputs("prompts", parsed, every, use_tqdm, _priorities(len(parsed), priority))

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutputs:
        """Answer conversations, rendered with the model's chat template.

        ``continue_final_message`` goes on with the last message, for which ``add_generation_prompt`` must be false.
        ``tools``: as OpenAI's chats have them, for the template; what the model calls is in the text, as it writes it.
        ``chat_template_kwargs``: what else the template can read.
        """
        options = {
            **(chat_template_kwargs or {}),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": check_tools([] if tools is None else list(tools)),
        }
        parsed = [
            ParsedPrompt(messages=conversation, template_options=options)
            for conversation in parse_conversations(messages)
        ]
        return self._outputs("conversations", parsed, _params_of_each(len(parsed), sampling_params), use_tqdm)

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

    def beam_search(
        self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The ``beam_width`` best continuations of each prompt. Raises RequestError as ``generate`` does."""
        every = self._tokenized("prompts", parse_prompts(prompts))
        for index, prompt in enumerate(every):
            with naming(f"prompts[{index}]"):
                self.engine.validate(prompt.token_ids or [], SamplingParams(max_tokens=params.max_tokens))
        searches = [BeamSearch(prompt.token_ids or [], params, self.engine.eos_token_ids) for prompt in every]
        with progress_bar("searching", params.max_tokens, "token", disable=not use_tqdm) as bar:
            for _ in range(params.max_tokens):
                beams = [beam.tokens for search in searches for beam in search.beams]
                outputs = iter(self.generate(beams, next_token(params), use_tqdm=False))
                for search in searches:
                    search.advance(list(itertools.islice(outputs, len(search.beams))))
                bar.update()
        return [search.result(self.engine.tokenizer.decode) for search in searches]

    def get_tokenizer(self) -> Tokenizer:
        """The model's: ``encode``, ``decode``, ``apply_chat_template``, which makes a text, and what it is."""
        return self.engine.tokenizer

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

    def _outputs(
        self,
        name: str,
        prompts: Sequence[ParsedPrompt],
        every: Sequence[SamplingParams | None],
        use_tqdm: bool,
        priorities: Sequence[int] | None = None,
    ) -> RequestOutputs:
        """Serve prompts, which errors call ``name``."""
        asked = []
        for index, (prompt, params) in enumerate(zip(self._tokenized(name, prompts), every, strict=True)):
            with naming(f"{name}[{index}]"):
                asked.append(self._asked(prompt, params, {} if priorities is None else {"priority": priorities[index]}))
        num_completions = sum(len(one.completions) for one in asked)
        with progress_bar("generating", num_completions, "output", disable=not use_tqdm) as bar:
            self._calls.run(self._serve(asked), bar.update)
        return RequestOutputs(request_output(one.request_id, one.completions, one.n) for one in asked)

    def _tokenized(self, name: str, prompts: Sequence[ParsedPrompt]) -> list[ParsedPrompt]:
        rendered = []
        for index, prompt in enumerate(prompts):
            with naming(f"{name}[{index}]"):
                rendered.append(self._model.rendered(prompt))
        return self._model.tokenized(rendered)

    def _asked(self, prompt: ParsedPrompt, params: SamplingParams | None, given: Mapping[str, Any]) -> _Asked:
        """The prompt's requests, checked, without output yet. ``given`` goes before the parameters."""
        token_ids = self._model.token_ids(prompt, sampling={} if params is None else vars(params))
        if params is None:
            params = self._model.sampling_params(given, len(token_ids))
        elif given:
            params = replace(params, **given)
        request_id = f"llm-{next(self._ids)}"
        completions = Completion.choices(request_id, token_ids, params, prompt.text)
        self.engine.validate(token_ids, completions[0].params)
        return _Asked(request_id, params.n, completions, self.engine.grammar_of(params))

    def _serve(self, asked: Sequence[_Asked]) -> Generator[int | None]:
        """Serve these requests, on the engine's thread; yields after every change, 1 for a request that has ended."""
        unfinished: dict[str, Completion] = {}
        try:
            for completion, grammar in ((completion, one.grammar) for one in asked for completion in one.completions):
                self.engine.add_request(
                    completion.request_id, completion.prompt_token_ids, completion.params, grammar=grammar
                )
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
    grammar: Grammar | None


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


def _priorities(num_prompts: int, priority: Iterable[int] | None) -> list[int] | None:
    """One for each prompt. Raises RequestError."""
    if priority is None:
        return None
    if not isinstance(priority, Iterable):
        raise RequestError(f"priority must be a list of integers, one for each prompt, got {priority!r:.80}")
    priorities = list(priority)
    if len(priorities) != num_prompts:
        raise RequestError(f"priority must be one for each prompt, got {len(priorities)} for {num_prompts}")
    return priorities
