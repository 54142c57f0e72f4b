"""Ways to a server that is running: OpenAI's API over HTTP, whoever serves it, and jaxserve's own over gRPC."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

import grpc
import httpx2

from jaxserve.server.client import AsyncClient

NO_PROXY = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
"""No proxy of the environment reaches this machine."""
STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.ABORTED: HTTPStatus.CONFLICT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNIMPLEMENTED: HTTPStatus.NOT_IMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""HTTP's word for gRPC's, as in google/rpc/code.proto; of any other code it is 500."""


class Reply(NamedTuple):
    """What a server has answered: a response's body, or one with an ``error``."""

    status: int
    body: Mapping[str, Any]
    text: str


class Unreachable(Exception):
    """No answer came, and one may come later."""


class Transport(Protocol):
    """A way to one server. Create it inside the event loop."""

    async def send(self, path: str, body: Mapping[str, Any]) -> Reply:
        """The answer to a body of OpenAI's API. Raises Unreachable."""

    async def close(self) -> None:
        """Close the connections, which aborts what is under way."""


class HttpTransport:
    """``url``: with or without /v1. ``concurrency``: so many connections at most."""

    def __init__(self, url: str, concurrency: int, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx2.AsyncClient(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=None,
            mounts=NO_PROXY,
            limits=httpx2.Limits(max_connections=concurrency),
        )

    async def send(self, path: str, body: Mapping[str, Any]) -> Reply:
        """See Transport."""
        try:
            response = await self._client.post(self._url + path, json=body)
        except httpx2.TransportError as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None
        with contextlib.suppress(ValueError):
            if isinstance(answer := response.json(), dict):
                return Reply(response.status_code, answer, response.text)
        return Reply(response.status_code, {"error": {"message": response.text}}, response.text)

    async def close(self) -> None:
        """See Transport."""
        await self._client.aclose()


class GrpcTransport:
    """``url``: grpc:// and a target. One connection carries any number of requests."""

    def __init__(self, url: str, concurrency: int, api_key: str | None) -> None:
        self._client = AsyncClient(url.removeprefix("grpc://"), api_key=api_key)

    async def send(self, path: str, body: Mapping[str, Any]) -> Reply:
        """See Transport."""
        try:
            return Reply(HTTPStatus.OK, await self._client.respond(path, body), "")
        except grpc.aio.AioRpcError as error:
            message = error.details() or error.code().name
            status = STATUSES.get(error.code(), HTTPStatus.INTERNAL_SERVER_ERROR)
            return Reply(status, {"error": {"message": message}}, message)

    async def close(self) -> None:
        """See Transport."""
        await self._client.close()
