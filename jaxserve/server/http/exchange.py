"""One HTTP request and its response, as ASGI has them: a body within limits, and work that ends with the connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import orjson
from starlette.types import Receive, Send

from jaxserve.server.bodies import parse_body
from jaxserve.server.http.errors import CLIENT_CLOSED_REQUEST, Failure

BODY_SECONDS = 60
"""In which a body must have come: whoever sends one has a place in the queue."""


async def read_body(receive: Receive, max_body_bytes: int) -> tuple[dict[str, Any], int]:
    """The JSON object that a request carries, and its size in bytes. Raises RequestError and Failure."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await _receive_all(receive, max_body_bytes)
    except TimeoutError:
        text = f"body must come within {BODY_SECONDS} s"
        raise Failure(HTTPStatus.REQUEST_TIMEOUT, "invalid_request_error", text, {"Connection": "close"}) from None
    return parse_body(data), len(data)


async def _receive_all(receive: Receive, max_body_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Failure(CLIENT_CLOSED_REQUEST, "invalid_request_error", "the connection was closed")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > max_body_bytes:
            text = f"body must have at most max_message_bytes, {max_body_bytes}, got more"
            raise Failure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error", text)
        more = message.get("more_body", False)
    return b"".join(parts)


class Exchange:
    """Work that ends with the connection, and what it sends."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send

    async def until_disconnect(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, unless the caller goes: then it is cancelled at once. To be called once the body is read."""
        working, gone = asyncio.ensure_future(work()), asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (working, gone):
                task.cancel()
            await asyncio.wait((working, gone))
        if not working.cancelled():
            await working

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(self, value: object) -> None:
        """A whole response, as JSON."""
        body = orjson.dumps(value)
        await self._begin({"content-type": "application/json", "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def begin_events(self) -> None:
        """Begin a response of server-sent events."""
        # For proxies: events are of use only as they come.
        await self._begin({"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def event(self, data: bytes, name: str | None = None) -> None:
        """Waits while the caller reads more slowly than events come."""
        line = b"" if name is None else b"event: " + name.encode() + b"\n"
        await self._send({"type": "http.response.body", "body": line + b"data: " + data + b"\n\n", "more_body": True})

    async def end_events(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def _begin(self, headers: dict[str, str]) -> None:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": raw})
