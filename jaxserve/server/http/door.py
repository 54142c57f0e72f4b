"""What every HTTP request passes: its name, its key, and errors that nothing else has caught."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.server.caller import ANYBODY, Caller, current_caller
from jaxserve.server.calls import Calls, name_of
from jaxserve.server.http.errors import CLIENT_CLOSED_REQUEST, Failure, failure_of
from jaxserve.server.http.page import PAGE
from jaxserve.server.keys import NO_KEY, Keys
from jaxserve.server.spans import caller_headers

OPEN_PATHS = ("/health", "/ready", *PAGE)
"""What probes ask for, who have no key, and the page, which asks for one and holds no secret."""


class Door:
    """ASGI middleware around ``app``, whose exceptions it turns into responses. Every response has an X-Request-Id, the
    caller's or a new one, and a line in the log.
    """

    def __init__(self, app: ASGIApp, keys: Keys, calls: Calls) -> None:
        self._app, self._keys, self._calls = app, keys, calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started_seconds, headers = time.monotonic(), dict(scope["headers"])
        request_id = name_of(headers.get(b"x-request-id", b"").decode("latin-1"))
        caller_headers.set(scope["headers"])
        status = CLIENT_CLOSED_REQUEST  # unless a response begins
        caller = ANYBODY

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if scope["path"] not in OPEN_PATHS:
                caller = self._caller(headers)
            current_caller.set(caller)
            await self._app(scope, receive, named)
        except Exception as error:
            failure = failure_of(error)
            if status == CLIENT_CLOSED_REQUEST:
                await failure.response()(scope, receive, named)
        finally:
            # Probes and the page ask every second.
            level = logging.DEBUG if scope["method"] == "GET" and status < HTTPStatus.BAD_REQUEST else logging.INFO
            self._calls.end(
                "http", request_id=request_id, caller=caller, method=scope["method"], path=scope["path"],
                status=str(int(status)), started_seconds=started_seconds, level=level,
            )  # fmt: skip

    def _caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        caller = self._keys.caller(headers.get(b"authorization", b""))
        if caller is None:
            bearer = {"WWW-Authenticate": "Bearer"}
            failure = Failure(HTTPStatus.UNAUTHORIZED, "authentication_error", NO_KEY, bearer)
            failure.error["code"] = "invalid_api_key"
            raise failure
        return caller
