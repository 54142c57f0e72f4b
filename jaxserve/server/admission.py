"""Who gets to the engines, whatever the protocol: nobody before they are warm or while they drain, and not too many."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxserve.server.caller import ANYBODY, Caller, current_caller
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import OverloadedError, UnavailableError
from jaxserve.server.replicas import Replicas

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.server.spans import Spans

DRAIN_POLL_SECONDS = 0.02


class Admission:
    """The engines of a server and the requests among them: warming up until ``open``, and from ``drain`` on closed.

    ``failed`` is set once an engine has failed, and with it all. ``spans``: see Replicas.
    """

    def __init__(self, config: ServerConfig, spans: Spans | None = None) -> None:
        self.failed = asyncio.Event()
        self.num_active = 0
        """Requests under way, those that still tokenize included."""
        self._num_active_of: Counter[Caller] = Counter()
        self._config, self._spans = config, spans
        self._replicas: Replicas | None = None
        self._draining = False

    def open(self, engines: Sequence[Engine]) -> None:
        """Admit requests to warm engines of one model, which from now on belong to this. Call it in the event loop."""
        names = self._config.served_model_names
        self._replicas = Replicas(engines, self.failed.set, self._config.step_timeout_seconds, names, self._spans)

    def replicas(self, model: str = "") -> Replicas:
        """The engines, for all but requests, if the caller wants their ``model`` or names none.

        Raises UnavailableError during warm-up, and UnknownModelError.
        """
        if self._replicas is None:
            raise UnavailableError("the server is warming up")
        if model:
            self._replicas.model.check_name(model)
        return self._replicas

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted now, but for the number of those under way."""
        return self._replicas is not None and not self._draining and not self.failed.is_set()

    @contextlib.contextmanager
    def request(self, model: str = "", num_sequences: int = 1) -> Iterator[Replicas]:
        """The engines for one request, or as many as ``num_sequences``, under way as long as the block runs.

        Raises UnavailableError, OverloadedError, and UnknownModelError.
        """
        replicas = self.replicas(model)
        if self._draining:
            raise UnavailableError("the server is draining")
        if self.num_active + num_sequences > self._config.max_waiting:
            raise OverloadedError(f"max_waiting requests are in flight, the limit is {self._config.max_waiting}")
        caller, most = current_caller.get(), self._config.max_waiting_per_key
        if most is not None and caller is not ANYBODY and self._num_active_of[caller] + num_sequences > most:
            raise OverloadedError(f"max_waiting_per_key requests of this API key are in flight, the limit is {most}")
        self.num_active += num_sequences
        self._num_active_of[caller] += num_sequences
        try:
            yield replicas
        finally:
            self.num_active -= num_sequences
            self._num_active_of[caller] -= num_sequences
            if not self._num_active_of[caller]:
                del self._num_active_of[caller]

    async def drain(self) -> None:
        """Refuse new requests, give the running ones drain_seconds to finish, abort the others, close the engines."""
        self._draining = True
        deadline_seconds = time.monotonic() + self._config.drain_seconds
        while self.num_active and time.monotonic() < deadline_seconds:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        if self._replicas is not None and not self.failed.is_set():
            await self._replicas.stop()
