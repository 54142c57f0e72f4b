"""Lines served by a server that is running: jaxserve's, or any other that speaks OpenAI's API over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator, Iterator
from http import HTTPStatus
from typing import Any

import httpx2

from jaxserve.batch.answer import Answer
from jaxserve.batch.lines import BatchLine
from jaxserve.batch.results import BatchFileError

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
NO_PROXY = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
"""No proxy of the environment reaches this machine."""


class EndpointServer:
    """Sends ``concurrency`` lines at once to the server at ``url``, such as http://127.0.0.1:8000, with or without /v1.

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
        if not url.startswith(("http://", "https://")):
            raise BatchFileError(f"endpoint must be a URL such as http://127.0.0.1:8000, got {url!r:.80}")
        if concurrency < 1:
            raise BatchFileError(f"concurrency must be at least 1, got {concurrency}")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._concurrency, self._patience_seconds = concurrency, patience_seconds
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def answers(self, lines: Iterator[BatchLine]) -> Generator[list[Answer]]:
        """See BatchServer. In an event loop of its own."""
        with asyncio.Runner() as runner:
            under_way = set[asyncio.Task[Answer]]()
            client = httpx2.AsyncClient(
                headers=self._headers,
                timeout=None,
                mounts=NO_PROXY,
                limits=httpx2.Limits(max_connections=self._concurrency),
            )
            try:
                while True:
                    while len(under_way) < self._concurrency and (line := next(lines, None)) is not None:
                        under_way.add(runner.get_loop().create_task(self._answer(client, line)))
                    if not under_way:
                        break
                    ended, under_way = runner.run(_some_of(under_way))
                    yield [task.result() for task in ended]
            finally:
                runner.run(_cancel(under_way, client))

    async def _answer(self, client: httpx2.AsyncClient, line: BatchLine) -> Answer:
        if line.endpoint is None or line.error is not None:
            return Answer.refusal(line, str(line.error))
        if line.body.get("stream"):
            return Answer.refusal(line, "stream must be false in a batch, got true")
        response = await self._response(client, line.endpoint.path, line.body)
        body = _body_of(response)
        if response.status_code == HTTPStatus.OK:
            return Answer(line, response.status_code, body)
        error = body.get("error", body)
        message = error.get("message", response.text) if isinstance(error, dict) else str(error)
        code = HTTPStatus(response.status_code).phrase.lower().replace(" ", "_")
        if response.status_code == HTTPStatus.BAD_REQUEST:
            return Answer.refusal(line, message)
        return Answer(line, response.status_code, error={"code": code, "message": message})

    async def _response(self, client: httpx2.AsyncClient, path: str, body: Any) -> httpx2.Response:
        """The answer of a server that is there and has room."""
        loop = asyncio.get_running_loop()
        give_up_seconds, wait_seconds = loop.time() + self._patience_seconds, FIRST_WAIT_SECONDS
        while True:
            try:
                response = await client.post(self._url + path, json=body)
            except httpx2.TransportError as error:
                obstacle = f"{type(error).__name__}: {error}"
            else:
                if response.status_code in NOT_ALLOWED:
                    raise BatchFileError(f"{self._url}: {response.text:.200}; the key is that of JAXSERVE_API_KEY")
                if response.status_code not in AGAIN:
                    return response
                obstacle = f"{response.status_code} {response.text:.200}"
            if loop.time() + wait_seconds > give_up_seconds:
                raise BatchFileError(f"{self._url}: no answer within {self._patience_seconds:g} s: {obstacle}")
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)


def _body_of(response: httpx2.Response) -> dict[str, Any]:
    """What a server has answered; of one that does not answer with a JSON object, an error in that shape."""
    with contextlib.suppress(ValueError):
        if isinstance(body := response.json(), dict):
            return body
    return {"error": {"message": response.text}}


async def _some_of(
    tasks: set[asyncio.Task[Answer]],
) -> tuple[set[asyncio.Task[Answer]], set[asyncio.Task[Answer]]]:
    """Those that have ended by the time that one has, and the others."""
    return await asyncio.wait(tasks, timeout=WAKE_SECONDS, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(tasks: set[asyncio.Task[Answer]], client: httpx2.AsyncClient) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
