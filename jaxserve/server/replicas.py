"""The engines of one server: replicas of a model on devices of their own, each in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jaxserve.request import Completion, RequestDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel
from jaxserve.server.caller import current_caller
from jaxserve.server.engine_thread import EngineThread

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.server.spans import Spans


GRAMMAR_THREADS = 2
"""Grammars of structured outputs that are compiled at once."""
IndexedDelta = tuple[int, RequestDelta]
"""What a step has added to which of several requests."""


class Replicas:
    """Gives every request to the engine with the fewest in flight. Create it inside the event loop.

    ``on_death``, ``step_timeout_seconds``: see EngineThread; the death of one is that of all. ``names``: what requests
    may call the model, instead of what it was started as. ``spans``: where every request has one.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        on_death: Callable[[], None],
        step_timeout_seconds: float,
        names: Sequence[str] = (),
        spans: Spans | None = None,
    ) -> None:
        self._spans = spans
        self._threads = [EngineThread(engine, on_death, step_timeout_seconds) for engine in engines]
        self._compiling = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammars")
        self.engines = tuple(engines)
        """To look on."""
        self.engine = engines[0]
        """Any of them, to ask for what they have in common."""
        self.model = ServedModel.of(engines[0], names)
        self.recent = [engine.metrics.recent for engine in engines]
        """What each did of late."""

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[RequestDelta, None]:
        """As EngineThread.generate."""
        client = current_caller.get().client
        # The one that has a request of this name refuses another.
        thread = self._thread_of(request_id) or min(self._threads, key=lambda thread: thread.num_in_flight)
        if params.structured_outputs is None:
            deltas = thread.generate(request_id, prompt_token_ids, params, client=client)
        else:
            deltas = self._generate_structured(thread, request_id, prompt_token_ids, params, client)
        if self._spans is None:
            return deltas
        return self._spans.around(deltas, self.model.names[0], request_id, prompt_token_ids, params)

    async def _generate_structured(
        self, thread: EngineThread, request_id: str, prompt_token_ids: list[int], params: SamplingParams, client: str
    ) -> AsyncGenerator[RequestDelta, None]:
        """The grammar is compiled first: neither the event loop nor the engine waits for that."""
        loop = asyncio.get_running_loop()
        grammar = await loop.run_in_executor(self._compiling, thread.engine.grammar_of, params)
        stream = thread.generate(request_id, prompt_token_ids, params, grammar, client)
        async with contextlib.aclosing(stream) as deltas:
            async for delta in deltas:
                yield delta

    async def generate_all(self, completions: Sequence[Completion]) -> AsyncGenerator[IndexedDelta, None]:
        """Of several requests, as they come, to their ends. Closing it aborts them; raises what ``generate`` does."""
        if len(completions) == 1:
            async with contextlib.aclosing(self._deltas(completions[0])) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        queue: asyncio.Queue[IndexedDelta | Exception | None] = asyncio.Queue(1)

        async def pump(index: int, completion: Completion) -> None:
            try:
                async with contextlib.aclosing(self._deltas(completion)) as deltas:
                    async for delta in deltas:
                        await queue.put((index, delta))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        pumps = [asyncio.create_task(pump(index, completion)) for index, completion in enumerate(completions)]
        try:
            num_unfinished = len(pumps)
            while num_unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_unfinished -= 1
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.wait(pumps)

    def _deltas(self, completion: Completion) -> AsyncGenerator[RequestDelta, None]:
        return self.generate(completion.request_id, completion.prompt_token_ids, completion.params)

    async def abort(self, request_id: str) -> bool:
        """As EngineThread.abort."""
        thread = self._thread_of(request_id)
        return thread is not None and await thread.abort(request_id)

    async def stop(self) -> None:
        """Abort what is left and give the devices back."""
        self._compiling.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            await thread.stop()
            thread.engine.close()

    def _thread_of(self, request_id: str) -> EngineThread | None:
        return next((thread for thread in self._threads if request_id in thread), None)
