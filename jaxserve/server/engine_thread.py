"""The one thread that steps the engine, and the asyncio side of it.

Commands go to the thread through a queue; what a step produced comes back to the event loop in one call. The engine
itself is only ever touched by its thread, so it needs no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.errors import RequestError
from jaxserve.request import FinishReason, RequestDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.errors import UnavailableError

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.grammars import Grammar

logger = logging.getLogger(__name__)

THREAD_NAME = "engine"
WATCH_SECONDS = 0.5
MAX_WAITING_DELTAS = 16
"""For one reader, before they are joined."""
JOINED_TOKENS = 64
"""Of a delta that no further one is joined to."""


class EngineDeadError(UnavailableError):
    """The engine failed or was stopped, and with it every request in flight; it takes no new ones."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped")


@dataclass(eq=False)
class _Stream:
    """One request's way back: what the engine thread produces, until its reader takes it.

    The engine waits for no reader. What one is behind with is joined, so that it can catch up in a few messages.
    """

    request_id: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _items: deque[RequestDelta | Exception] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, item: RequestDelta | Exception) -> None:
        last = self._items[-1] if len(self._items) >= MAX_WAITING_DELTAS else None
        if isinstance(item, RequestDelta) and isinstance(last, RequestDelta) and len(last.token_ids) < JOINED_TOKENS:
            self._items[-1] = last.followed_by(item)
        else:
            self._items.append(item)
        self._arrived.set()
        if isinstance(item, Exception) or item.finish_reason is not None:
            self.ended.set()

    async def get(self) -> RequestDelta | Exception:
        await self._arrived.wait()
        item = self._items.popleft()
        if not self._items:
            self._arrived.clear()
        return item


@dataclass(frozen=True)
class _Add:
    stream: _Stream
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_seconds: float
    grammar: Grammar | None
    client: str


@dataclass(frozen=True)
class _Abort:
    request_id: str


class _Stop:
    pass


def _name_thread(name: str) -> None:
    """For `top -H` and the like; Python itself tells Linux the names of threads from 3.14 on."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


class EngineThread:
    """Runs the engine in a thread of its own and streams its output to coroutines. Create it inside the event loop.

    ``on_death`` is called in the loop when a step of the engine raises, or takes longer than ``step_timeout_seconds``:
    the requests in flight get EngineDeadError, as does every later one.
    """

    def __init__(self, engine: Engine, on_death: Callable[[], None], step_timeout_seconds: float = math.inf) -> None:
        self.engine = engine
        self._on_death = on_death
        self._step_timeout_seconds = step_timeout_seconds
        self._step_started_seconds: float | None = None
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        # Two views of the requests in flight, each touched by one side only: the loop's holds a request until its
        # consumer is done, the thread's until the engine is.
        self._streams: dict[str, _Stream] = {}
        self._live: dict[str, _Stream] = {}
        self._dead = False
        self._stopping = False
        # A daemon: a program that fails elsewhere ends without a word to the engine.
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()
        self._watchdog = self._loop.create_task(self._watch())

    # ---- the event loop's side

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of this name is in flight."""
        return request_id in self._streams

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        grammar: Grammar | None = None,
        client: str = "",
    ) -> AsyncGenerator[RequestDelta, None]:
        """Deltas up to the one with a finish reason. Closing or cancelling the iterator aborts the request at once.

        Raises RequestError before the first delta, or later where a grammar takes more work than it may, and
        EngineDeadError at any time.
        """
        if self._dead:
            raise EngineDeadError()
        if request_id in self._streams:
            raise RequestError(f"request_id must be unique among the requests in flight, got {request_id!r} again")
        stream = self._streams[request_id] = _Stream(request_id)
        self._commands.put(_Add(stream, prompt_token_ids, params, time.monotonic(), grammar, client))
        try:
            while True:
                item = await stream.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if not stream.ended.is_set():
                self._commands.put(_Abort(request_id))
                stream.ended.set()
            del self._streams[request_id]

    async def abort(self, request_id: str) -> bool:
        """End a request from outside; its stream ends with FinishReason.ABORT. False if there is no such request."""
        stream = self._streams.get(request_id)
        if stream is None or stream.ended.is_set():
            return False
        self._commands.put(_Abort(request_id))
        await stream.ended.wait()
        return True

    async def stop(self) -> None:
        """Abort what is left and end the thread; a step under way is finished first."""
        self._dead = True
        self._watchdog.cancel()
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    def _deliver(self, items: Sequence[tuple[_Stream, RequestDelta | Exception]]) -> None:
        for stream, item in items:
            stream.put(item)

    async def _watch(self) -> None:
        """A step that never ends, as when a device hangs, can be neither interrupted nor waited for."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            started_seconds = self._step_started_seconds
            if started_seconds is not None and time.monotonic() - started_seconds > self._step_timeout_seconds:
                logger.critical("a step has not ended within step_timeout_seconds, %g", self._step_timeout_seconds)
                self._die()
                return

    def _die(self) -> None:
        self._dead = True
        self._watchdog.cancel()
        for stream in self._streams.values():
            if not stream.ended.is_set():
                stream.put(EngineDeadError())
        self._on_death()

    # ---- the engine thread's side

    def _run(self) -> None:
        _name_thread(THREAD_NAME)
        try:
            while self._take_commands():
                self._step()
            self._stopping = True
            for request_id in self._live:
                self.engine.abort(request_id)
            while self.engine.has_unfinished():
                self._step()
        except Exception:
            logger.exception("the engine failed with %d requests in flight", len(self._live))
            self._loop.call_soon_threadsafe(self._die)

    def _step(self) -> None:
        self._step_started_seconds = time.monotonic()
        deltas = self.engine.step()
        self._step_started_seconds = None
        if deltas:
            self._send([(self._live[delta.request_id], self._item(delta)) for delta in deltas])
        for delta in deltas:
            if delta.finish_reason is not None:
                del self._live[delta.request_id]

    def _item(self, delta: RequestDelta) -> RequestDelta | Exception:
        """A request that the end of the server cuts off before its first token was not served at all; one that cannot
        go on has failed alone."""
        if delta.error is not None:
            return RequestError(delta.error)
        unserved = delta.finish_reason is FinishReason.ABORT and not delta.metrics.token_seconds
        return EngineDeadError() if self._stopping and unserved else delta

    def _send(self, items: Sequence[tuple[_Stream, RequestDelta | Exception]]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, items)

    def _take_commands(self) -> bool:
        """Carry out the commands that wait; with an idle engine, wait for some. False to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                match self._commands.get(block=not self.engine.has_unfinished()):
                    case _Add() as command:
                        self._add(command)
                    case _Abort(request_id):
                        # Knows nothing of a request that ended while the command was on its way.
                        self.engine.abort(request_id)
                    case _Stop():
                        return False
        return True

    def _add(self, command: _Add) -> None:
        stream = command.stream
        if stream.request_id in self._live:
            # An aborted request of the same name whose end the engine has yet to report.
            self._step()
        try:
            self.engine.add_request(
                stream.request_id,
                command.prompt_token_ids,
                command.params,
                command.arrival_seconds,
                command.grammar,
                command.client,
            )
        except Exception as error:  # RequestError, or a fault: in either case this request fails alone
            self._send([(stream, error)])
        else:
            self._live[stream.request_id] = stream
