"""What every call passes: limits on calls and messages, and the one place where errors become gRPC statuses."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from jaxserve.errors import RequestError
from jaxserve.served_model import UnknownModelError
from jaxserve.server.caller import current_caller
from jaxserve.server.calls import Calls, name_of
from jaxserve.server.errors import RETRY_AFTER_MS, AbortedError, OverloadedError, UnavailableError
from jaxserve.server.keys import NO_KEY, Keys
from jaxserve.server.spans import caller_headers

logger = logging.getLogger(__name__)

MAX_STATUS_BYTES = 1000
"""A status travels in the trailing headers, which have a limit; a message may quote what the caller sent."""

Context = grpc.aio.ServicerContext[Any, Any]
OpenMessage = Callable[[], AbstractContextManager[Any]]
"""Gives one message of a stream of requests, for as long as it is served; raises what a call of its own would."""


class StatusError(Exception):
    """An RPC's failure as the client sees it."""

    def __init__(
        self, code: grpc.StatusCode, message: str, trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message.encode()[:MAX_STATUS_BYTES].decode(errors="ignore")
        self.trailing_metadata = trailing_metadata


def status_of(error: Exception) -> StatusError:
    """What the client may know of an exception: everything of our own errors, nothing of any other."""
    match error:
        case StatusError():
            return error
        case UnknownModelError():
            return StatusError(grpc.StatusCode.NOT_FOUND, str(error))
        case RequestError():
            return StatusError(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case UnavailableError():
            return StatusError(grpc.StatusCode.UNAVAILABLE, str(error))
        case OverloadedError():
            when = (("retry-after-ms", str(RETRY_AFTER_MS)),)
            return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), when)
        case AbortedError():
            return StatusError(grpc.StatusCode.ABORTED, str(error))
        case DecodeError():
            return StatusError(grpc.StatusCode.INVALID_ARGUMENT, "the request is no message of this method")
    logger.error("uncaught exception in an RPC", exc_info=error)
    return StatusError(grpc.StatusCode.INTERNAL, "internal error")


def check_response_size(num_bytes: int, max_message_bytes: int) -> None:
    """Raise RequestError for what gRPC would not send."""
    if num_bytes > max_message_bytes:
        raise RequestError(f"response of {num_bytes} bytes exceeds max_message_bytes {max_message_bytes}")


def _is_probe(method: str) -> bool:
    return method.startswith(f"/{health.SERVICE_NAME}/")


class Door(grpc.aio.ServerInterceptor):
    """Admits callers with a key, up to ``max_calls`` calls at once, and all health checks. Turns exceptions into
    statuses; without it gRPC sends the text of any exception to the client.

    A message of a stream of requests is a call as well, which fails alone: handlers of such streams get an iterator of
    OpenMessage.
    """

    def __init__(self, keys: Keys, calls: Calls, max_calls: int, max_message_bytes: int) -> None:
        self.max_request_bytes: int | None = None
        """Larger requests are refused before they are parsed, which takes Python's lock for as long as it takes."""
        self._keys, self._max_calls, self._max_message_bytes = keys, max_calls, max_message_bytes
        self._calls, self._num_calls = calls, 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        counted = not _is_probe(method)
        metadata = dict(handler_call_details.invocation_metadata or ())
        if counted:
            caller = self._keys.caller(str(metadata.get("authorization", "")).encode())
            if caller is None:
                return grpc.stream_stream_rpc_method_handler(functools.partial(self._refuse, method))
            current_caller.set(caller)  # gRPC runs this and the handler in one task
        handler = await continuation(handler_call_details)
        if handler is None or method.startswith(f"/{reflection.SERVICE_NAME}/"):  # an unknown method; gRPC's own
            return handler
        if handler.request_streaming:
            stream = functools.partial(self._stream, handler, method)
            return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        call = functools.partial(self._call, handler, method)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(call, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(call)

    async def _refuse(self, method: str, requests: object, context: Context) -> None:
        async with self._serving(method, context):
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, NO_KEY)

    async def _call(self, handler: Any, method: str, message: bytes, context: Context) -> Any:
        """Bytes in; out, the bytes of the one response, or nothing where the handler writes a stream of them."""
        async with self._serving(method, context):
            with contextlib.nullcontext() if _is_probe(method) else self._admitted():
                request = self._parsed(handler, message)
                if handler.response_streaming:
                    return await handler.unary_stream(request, context)
                response = handler.response_serializer(await handler.unary_unary(request, context))
                check_response_size(len(response), self._max_message_bytes)
                return response

    async def _stream(self, handler: Any, method: str, messages: AsyncIterator[bytes], context: Context) -> None:
        """A stream of bytes in, to a handler that writes its responses."""

        @contextlib.contextmanager
        def opened(message: bytes) -> Iterator[Any]:
            with self._admitted():
                yield self._parsed(handler, message)

        async with self._serving(method, context):
            with self._admitted():
                await handler.stream_stream((functools.partial(opened, message) async for message in messages), context)

    @contextlib.asynccontextmanager
    async def _serving(self, method: str, context: Context) -> AsyncIterator[None]:
        """End the call with the status of the exception that ends the block, and tell of it."""
        started_seconds, metadata = time.monotonic(), context.invocation_metadata() or ()
        caller_headers.set(metadata)
        code = grpc.StatusCode.CANCELLED  # unless it comes to an end
        try:
            yield
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:  # of a health check
            code = grpc.StatusCode.NOT_FOUND
            raise
        except Exception as error:
            status = status_of(error)
            code = status.code
            await context.abort(code, status.message, status.trailing_metadata)
        finally:
            self._calls.end(
                "grpc", request_id=name_of(str(dict(metadata).get("x-request-id", ""))), caller=current_caller.get(),
                method="gRPC", path=method, status=code.name, started_seconds=started_seconds,
                level=logging.DEBUG if _is_probe(method) else logging.INFO,
            )  # fmt: skip

    def _parsed(self, handler: Any, message: bytes) -> Any:
        if self.max_request_bytes is not None and len(message) > self.max_request_bytes:
            raise RequestError(
                f"request of {len(message)} bytes exceeds {self.max_request_bytes} bytes, "
                "more than a prompt of max_model_len tokens takes"
            )
        return handler.request_deserializer(message) if handler.request_deserializer else message

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._num_calls >= self._max_calls:
            raise OverloadedError(f"{self._num_calls} calls are under way, the limit is {self._max_calls}")
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1
