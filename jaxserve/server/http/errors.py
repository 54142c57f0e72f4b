"""The one place where errors become HTTP statuses, in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.served_model import UnknownModelError
from jaxserve.server.errors import RETRY_AFTER_MS, AbortedError, OverloadedError, UnavailableError

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status of a request whose caller has gone, or ended it from elsewhere."""
RETRY_AFTER = {"Retry-After": str(-(-RETRY_AFTER_MS // 1000))}


class Failure(Exception):
    """A response that is no success."""

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": None}

    def body(self) -> bytes:
        return orjson.dumps({"error": self.error})

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def failure_of(error: Exception) -> Failure:
    """What the client may know of an exception: everything of our own errors, nothing of any other."""
    match error:
        case Failure():
            return error
        case UnknownModelError():
            failure = Failure(HTTPStatus.NOT_FOUND, "invalid_request_error", str(error))
            failure.error["code"] = "model_not_found"
            return failure
        case RequestError():
            return Failure(HTTPStatus.BAD_REQUEST, "invalid_request_error", str(error))
        case UnavailableError():
            return Failure(HTTPStatus.SERVICE_UNAVAILABLE, "service_unavailable_error", str(error), RETRY_AFTER)
        case OverloadedError():
            return Failure(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", str(error), RETRY_AFTER)
        case AbortedError():
            return Failure(CLIENT_CLOSED_REQUEST, "aborted_error", str(error))
        case HTTPException():  # no such path, or not by this method
            return Failure(error.status_code, "invalid_request_error", str(error.detail), error.headers)
    logger.error("uncaught exception in an HTTP request", exc_info=error)
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "internal_server_error", "internal error")
