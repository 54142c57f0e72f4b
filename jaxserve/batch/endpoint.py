"""Lines served by a server that is running: jaxserve's, or any other that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from jaxserve.batch.answer import Answer
from jaxserve.batch.lines import BatchLine
from jaxserve.batch.results import BatchFileError
from jaxserve.batch.transport import GrpcTransport, HttpTransport, Reply, Transport, Unreachable

AGAIN = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""What a server answers that is busy, drains or comes up."""
NOT_ALLOWED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 8.0
PATIENCE_SECONDS = 300.0
"""How long a request is sent again and again, while a server restarts, say."""
WAKE_SECONDS = 0.1
"""How often an interrupt is looked for while nothing is answered."""
TRANSPORTS: Mapping[str, Callable[[str, int, str | None], Transport]] = {
    "http": HttpTransport,
    "https": HttpTransport,
    "grpc": GrpcTransport,
}
"""By the schemes of their URLs."""


class EndpointServer:
    """Sends ``concurrency`` lines at once to the server at ``url``, such as http://127.0.0.1:8000 or
    grpc://127.0.0.1:50051.

    What is interrupted closes its connections, which aborts the requests. A server that cannot be reached, or is busy,
    is asked again for ``patience_seconds``; then BatchFileError ends the run, and no line has a result for it.
    """

    budget_use = None

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 64,
        api_key: str | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in TRANSPORTS:
            raise BatchFileError(
                f"endpoint must be a URL such as http://127.0.0.1:8000 or grpc://127.0.0.1:50051, got {url!r:.80}"
            )
        if concurrency < 1:
            raise BatchFileError(f"concurrency must be at least 1, got {concurrency}")
        self._url, self._concurrency, self._patience_seconds = url, concurrency, patience_seconds
        self._connected = partial(TRANSPORTS[scheme], url, concurrency, api_key)

    def answers(self, lines: Iterator[BatchLine]) -> Generator[list[Answer]]:
        """See BatchServer. In an event loop of its own."""
        with asyncio.Runner() as runner:
            under_way = set[asyncio.Task[Answer]]()
            server = runner.run(self._connect())
            try:
                while True:
                    while len(under_way) < self._concurrency and (line := next(lines, None)) is not None:
                        under_way.add(runner.get_loop().create_task(self._answer(server, line)))
                    if not under_way:
                        break
                    ended, under_way = runner.run(_some_of(under_way))
                    yield [task.result() for task in ended]
            finally:
                runner.run(_cancel(under_way, server))

    async def _connect(self) -> Transport:
        return self._connected()

    async def _answer(self, server: Transport, line: BatchLine) -> Answer:
        if line.endpoint is None or line.error is not None:
            return Answer.refusal(line, str(line.error))
        reply = await self._reply(server, line.endpoint.path, line.body)
        if reply.status == HTTPStatus.OK:
            return Answer(line, reply.status, dict(reply.body))
        error = reply.body.get("error", reply.body)
        message = error.get("message", reply.text) if isinstance(error, dict) else str(error)
        if reply.status == HTTPStatus.BAD_REQUEST:
            return Answer.refusal(line, message)
        return Answer(line, reply.status, error={"code": _code_of(reply.status), "message": message})

    async def _reply(self, server: Transport, path: str, body: Any) -> Reply:
        """The answer of a server that is there and has room."""
        loop = asyncio.get_running_loop()
        give_up_seconds, wait_seconds = loop.time() + self._patience_seconds, FIRST_WAIT_SECONDS
        while True:
            try:
                reply = await server.send(path, body)
            except Unreachable as error:
                obstacle = str(error)
            else:
                if reply.status in NOT_ALLOWED:
                    raise BatchFileError(f"{self._url}: {reply.text:.200}; the key is that of JAXSERVE_API_KEY")
                if reply.status not in AGAIN:
                    return reply
                obstacle = f"{int(reply.status)} {reply.text:.200}"
            if loop.time() + wait_seconds > give_up_seconds:
                raise BatchFileError(f"{self._url}: no answer within {self._patience_seconds:g} s: {obstacle}")
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)


def _code_of(status: int) -> str:
    """As OpenAI's batches name it; some servers have statuses of their own."""
    with contextlib.suppress(ValueError):
        return HTTPStatus(status).phrase.lower().replace(" ", "_")
    return f"status_{status}"


async def _some_of(
    tasks: set[asyncio.Task[Answer]],
) -> tuple[set[asyncio.Task[Answer]], set[asyncio.Task[Answer]]]:
    """Those that have ended by the time that one has, and the others."""
    return await asyncio.wait(tasks, timeout=WAKE_SECONDS, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(tasks: set[asyncio.Task[Answer]], server: Transport) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.close()
