"""Offline inference, with vLLM's conventions: for notebooks and batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

from tqdm import tqdm

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.request import (
    CompletionOutput,
    Logprob,
    RequestDelta,
    RequestError,
    RequestOutput,
    SamplingParams,
)

Prompt = str | list[int]
Message = dict[str, Any]


class LLM:
    """A model in this process. Keyword arguments are those of EngineConfig; also a context manager.

    >>> with LLM(model="smollm2-135m", token_budget=256, max_num_seqs=16, max_model_len=2048) as llm:
    ...     outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
    """

    def __init__(self, model: str = "smollm2-135m", *, show_progress: bool = True, **config: Any) -> None:
        self.engine = Engine(EngineConfig(model=model, **config), show_progress=show_progress)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids); outputs come in the order of the prompts.

        Without sampling parameters those of ``get_default_sampling_params`` are taken, with a max_tokens of the model's
        cut to what max_model_len leaves; given ones are taken as they are.
        Every prompt is checked before any is run: a bad one raises RequestError, naming it, and nothing is computed.
        """
        every_prompt = _as_list(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in every_prompt]
        token_ids = [self.engine.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in every_prompt]
        every = self._params_of_each(token_ids, sampling_params)
        for index, (ids, one) in enumerate(zip(token_ids, every, strict=True)):
            try:
                self.engine.validate(ids, one)
            except RequestError as error:
                raise RequestError(f"prompts[{index}]: {error}") from error
        return self._run(texts, token_ids, every, use_tqdm)

    def chat(
        self,
        messages: list[Message] | Sequence[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations, rendered with the model's chat template."""
        tokenizer = self.engine.tokenizer
        # The template writes the special tokens itself.
        prompts: list[Prompt] = [
            tokenizer.encode(tokenizer.apply_chat_template(conversation), add_special_tokens=False)
            for conversation in _as_conversations(messages)
        ]
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        for output in outputs:
            output.prompt = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        return outputs

    def score(
        self, prompts: Prompt | Sequence[Prompt], *, num_logprobs: int = 0, use_tqdm: bool = False
    ) -> list[list[dict[int, Logprob] | None]]:
        """Log-probability of every prompt token given those before it; the first entry is None.

        Each entry maps the prompt's token, and the ``num_logprobs`` likeliest ones, to a Logprob.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=num_logprobs, ignore_eos=True)
        outputs = self.generate(prompts, params, use_tqdm=use_tqdm)
        return [output.prompt_logprobs or [] for output in outputs]

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (unless generation_config is none), then those of SamplingParams."""
        return SamplingParams(**self.engine.sampling_defaults)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _params_of_each(
        self, token_ids: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            defaults, limit = self.engine.sampling_defaults, self.engine.max_model_len
            return [SamplingParams.with_defaults({}, defaults, limit - len(ids)) for ids in token_ids]
        every = [params] * len(token_ids) if isinstance(params, SamplingParams) else list(params)
        if len(every) != len(token_ids):
            raise RequestError(
                f"sampling_params must be one or as many as prompts, got {len(every)} for {len(token_ids)}"
            )
        return every

    def _run(
        self,
        texts: list[str | None],
        token_ids: list[list[int]],
        params: list[SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        collectors: dict[str, _Collector] = {}
        for text, ids, one in zip(texts, token_ids, params, strict=True):
            request_id = f"llm-{next(self._ids)}"
            self.engine.add_request(request_id, ids, one)
            collectors[request_id] = _Collector(text, ids, one)
        finished: dict[str, RequestOutput] = {}
        try:
            with tqdm(total=len(collectors), desc="generating", unit="prompt", disable=not use_tqdm) as progress:
                while len(finished) < len(collectors):
                    for delta in self.engine.step():
                        output = collectors[delta.request_id].add(delta)
                        if output is not None:
                            finished[delta.request_id] = output
                            progress.update()
        finally:
            # After an interrupt (a notebook's stop button), leave nothing behind in the engine.
            for request_id in collectors.keys() - finished.keys():
                self.engine.abort(request_id)
            while self.engine.has_unfinished():
                self.engine.step()
        return [finished[request_id] for request_id in collectors]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, text or token ids, is a list of one. Raises RequestError for what is neither."""
    if isinstance(prompts, str) or (prompts and all(isinstance(token, int) for token in prompts)):
        prompts = cast(list[Prompt], [prompts])
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list):
            raise RequestError(f"prompts[{index}] must be a text or a list of token ids, got {prompt!r:.80}")
    return cast(list[Prompt], list(prompts))


def _as_conversations(messages: list[Message] | Sequence[list[Message]]) -> list[list[Message]]:
    """One conversation is a list of one."""
    single = messages and all(isinstance(message, dict) for message in messages)
    return cast(list[list[Message]], [messages] if single else list(messages))


class _Collector:
    """Builds one RequestOutput from its deltas."""

    def __init__(self, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.prompt, self.prompt_token_ids = prompt, prompt_token_ids
        self.token_ids: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def add(self, delta: RequestDelta) -> RequestOutput | None:
        """The output, once the delta is the last one."""
        self.token_ids += delta.token_ids
        self.text.append(delta.text)
        if self.logprobs is not None and delta.logprobs is not None:
            self.logprobs += delta.logprobs
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        if delta.finish_reason is None:
            return None
        total = None
        if self.logprobs is not None:
            total = sum(entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=True))
        completion = CompletionOutput(
            index=0,
            text="".join(self.text),
            token_ids=self.token_ids,
            cumulative_logprob=total,
            logprobs=self.logprobs,
            finish_reason=delta.finish_reason.value,
            stop_reason=delta.stop_reason,
        )
        return RequestOutput(
            request_id=delta.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[completion],
            finished=True,
            metrics=delta.metrics,
        )
