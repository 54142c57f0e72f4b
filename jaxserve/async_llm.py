"""Inference for coroutines, with the conventions of vLLM's AsyncLLM: for notebooks and programs of asyncio."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import RequestError
from jaxserve.prompts import Message, ParsedPrompt, Prompt, parse_conversations, parse_prompts
from jaxserve.request import Completion, RequestOutput, request_output
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel
from jaxserve.server.replicas import Replicas
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class AsyncLLM:
    """A model in this process. Keyword arguments are those of EngineConfig; the constructor loads, as that of LLM does.

    It belongs to the event loop in which it is first used: a notebook has one that is always running. Calls are served
    together, and each may be cancelled or closed at any moment, which aborts its request at once.

    >>> async def main():
    ...     async with AsyncLLM(model="smollm2-135m", max_model_len=2048) as llm:
    ...         async for output in llm.generate("The capital of France is", SamplingParams(max_tokens=8)):
    ...             print(output.outputs[0].text)
    """

    def __init__(self, model: str = "smollm2-135m", *, show_progress: bool = True, **config: Any) -> None:
        self.engine = Engine(EngineConfig(model=model, **config), show_progress=show_progress)
        self._model = ServedModel.of(self.engine)
        self._ids = itertools.count()
        self._replicas: Replicas | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue one prompt: whenever tokens come, its output so far, the last one ``finished``.

        Where more outputs are made than kept (best_of over n), only the last. Raises RequestError before the first.
        """
        parsed = parse_prompts(prompt)
        if len(parsed) != 1:
            raise RequestError(f"prompt must be a text or a list of token ids, got {len(parsed)} of them")
        async with aclosing(self._generate(parsed[0], sampling_params, request_id)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Iterable[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation, as ``generate``. ``template_options``: see Tokenizer.apply_chat_template."""
        (conversation,) = parse_conversations(messages)
        prompt = ParsedPrompt(messages=conversation, template_options=template_options)
        async with aclosing(self._generate(prompt, sampling_params, request_id)) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str) -> bool:
        """End a request from outside; its output ends with the finish reason ``abort``. False if there is none."""
        return self._replicas is not None and await self._replicas.abort(request_id)

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    async def close(self) -> None:
        """Abort what is left and give the device's memory back; a second time does nothing."""
        if self._replicas is not None:
            await self._replicas.stop()
        self.engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _generate(
        self, prompt: ParsedPrompt, params: SamplingParams | None, request_id: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        replicas = self._running()
        # Off the loop: a long prompt takes a while.
        token_ids, text = await asyncio.to_thread(self._token_ids, prompt, {} if params is None else vars(params))
        if params is None:
            params = self._model.sampling_params({}, len(token_ids))
        request_id = f"async-llm-{next(self._ids)}" if request_id is None else request_id
        completions = Completion.choices(request_id, token_ids, params, text)
        for completion in completions:
            self.engine.validate(token_ids, completion.params)
        num_unfinished = len(completions)
        async with aclosing(replicas.generate_all(completions)) as deltas:
            async for index, delta in deltas:
                completions[index].add(delta)
                num_unfinished -= delta.finish_reason is not None
                if not (num_unfinished and params.ranks_choices):
                    yield request_output(request_id, completions, params.n, finished=not num_unfinished)

    def _token_ids(self, prompt: ParsedPrompt, sampling: Mapping[str, Any]) -> tuple[list[int], str | None]:
        rendered = self._model.rendered(prompt)
        return self._model.token_ids(rendered, sampling=sampling), rendered.text

    def _running(self) -> Replicas:
        """The engine in its thread, from the first use on. Raises RuntimeError in another event loop."""
        loop = asyncio.get_running_loop()
        if self._replicas is None:
            self._loop = loop
            self._replicas = Replicas([self.engine], _died, step_timeout_seconds=math.inf)
        elif loop is not self._loop:
            raise RuntimeError("an AsyncLLM belongs to the event loop in which it was first used, and this is another")
        return self._replicas


def _died() -> None:
    """Every request in flight raises EngineDeadError, and so does every later one."""
    logger.critical("the engine has failed")
