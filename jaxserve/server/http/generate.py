"""Completions and chats over HTTP: what the engines make of a body, whole or as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

import orjson
from starlette.responses import Response as StarletteResponse
from starlette.types import Receive, Scope, Send

from jaxserve.openai import Ask, Endpoint, Response
from jaxserve.request import FinishReason
from jaxserve.server.admission import Admission
from jaxserve.server.bodies import Bodies, whole
from jaxserve.server.errors import AbortedError
from jaxserve.server.http.errors import failure_of
from jaxserve.server.http.exchange import Exchange, read_body
from jaxserve.server.replicas import IndexedDelta, Replicas
from jaxserve.server.text_threads import TextThreads

DONE = b"[DONE]"


class Answer(StarletteResponse):
    """What the handler of an endpoint returns: everything happens while it is sent, so that it ends with the
    connection."""

    def __init__(self, endpoint: Endpoint, admission: Admission, texts: TextThreads, max_body_bytes: int) -> None:
        self._endpoint, self._admission, self._bodies = endpoint, admission, Bodies(admission, texts)
        self._max_body_bytes = max_body_bytes
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(receive, send)
        with self._admission.request() as replicas:
            body, num_bytes = await read_body(receive, self._max_body_bytes)
            ask = self._endpoint.parse(body, replicas.model)
            await exchange.until_disconnect(partial(self._answer, exchange, replicas, ask, num_bytes))

    async def _answer(self, exchange: Exchange, replicas: Replicas, ask: Ask, num_bytes: int) -> None:
        async with self._bodies.started(self._endpoint, ask, replicas, num_bytes) as (response, deltas):
            if ask.stream:
                # A request that cannot be served is told so with a status, which goes before the first event.
                await self._stream(exchange, response, await anext(deltas), deltas)
            else:
                await exchange.respond(await whole(response, deltas))

    async def _stream(
        self, exchange: Exchange, response: Response, first: IndexedDelta, deltas: AsyncGenerator[IndexedDelta]
    ) -> None:
        await exchange.begin_events()
        try:
            await self._send(exchange, response.first_events())
            await self._send(exchange, _events(response, first))
            async for delta in deltas:
                await self._send(exchange, _events(response, delta))
            await self._send(exchange, response.last_events())
        except Exception as error:  # the status has gone out; an event is what is left to tell it with
            await exchange.event(failure_of(error).body(), "error" if self._endpoint.names_events else None)
        if not self._endpoint.names_events:
            await exchange.event(DONE)
        await exchange.end_events()

    async def _send(self, exchange: Exchange, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            await exchange.event(orjson.dumps(event), event["type"] if self._endpoint.names_events else None)


def _events(response: Response, indexed: IndexedDelta) -> Iterable[dict[str, Any]]:
    index, delta = indexed
    if delta.finish_reason is FinishReason.ABORT:
        raise AbortedError()
    if delta.text or delta.token_ids or delta.finish_reason is not None:
        return response.events(index, delta)
    return ()
