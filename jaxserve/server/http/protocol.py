"""HTTP/1.1 from a socket: uvicorn's, with limits on what comes before the app sees anything."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.server.http.errors import Failure

MAX_HEAD_BYTES = 64 * 1024
"""Of a request line and its headers, and of whatever else is not a body."""
IDLE_SECONDS = 65
"""How long a connection may be without a whole one. Load balancers keep one that nobody uses for less: they should end
it, not this.
"""
LINGER_SECONDS = 2
"""How long a connection stays to read away what is still coming; the client would not see the answer otherwise."""

TOO_LARGE = Failure(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "invalid_request_error",
    f"request line and headers must have at most {MAX_HEAD_BYTES} bytes together, got more",
)
TOO_SLOW = Failure(
    HTTPStatus.REQUEST_TIMEOUT,
    "invalid_request_error",
    f"request line and headers must come within {IDLE_SECONDS} s",
)


class LimitedProtocol(HttpToolsProtocol):
    """Refuses heads that are too large or too slow, in OpenAI's shape, and closes connections that send nothing."""

    _head_bytes = 0
    """Received since the parser gave something on: parts of a head, or of trailers after a body."""
    _head_timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        while data and not self._refused and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._head_bytes
            if not room:
                self._refuse(TOO_LARGE)
                return
            part, data = data[:room], data[room:]
            self._head_bytes += len(part)
            super().data_received(part)
        if self._head_bytes and self._head_timer is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._end_of_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end_of_head()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(IDLE_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._responds():  # the head is of a request after the one that is served
            self._wait_for_head()
        elif self._head_bytes:
            self._refuse(TOO_SLOW)
        else:
            self.transport.close()

    def _responds(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_of_head(self) -> None:
        self._head_bytes = 0
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, failure: Failure) -> None:
        self._refused = True
        self._stop_timer()
        if self._responds():  # an answer of ours would be taken for a part of that one
            self.transport.close()
            return
        response = failure.response()
        response.headers["connection"] = "close"
        head = [b"HTTP/1.1 %d %s" % (failure.status, HTTPStatus(failure.status).phrase.encode())]
        head += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*head, b"", response.body]))
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
