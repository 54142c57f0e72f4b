"""OpenAI's bodies, whatever protocol brings them: from a body to the engines, and from their deltas to a response."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Any

import orjson

from jaxserve.errors import RequestError
from jaxserve.openai import Ask, Endpoint, Response
from jaxserve.request import FinishReason
from jaxserve.server.admission import Admission
from jaxserve.server.errors import AbortedError
from jaxserve.server.replicas import IndexedDelta, Replicas
from jaxserve.server.text_threads import TextThreads


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object that a request carries. Raises RequestError."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"body must be JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"body must be a JSON object, got {body!r:.80}")
    return body


class Bodies:
    """Starts what bodies ask for. ``texts``: where prompts become tokens."""

    def __init__(self, admission: Admission, texts: TextThreads) -> None:
        self._admission, self._texts = admission, texts

    @contextlib.asynccontextmanager
    async def started(
        self, endpoint: Endpoint, ask: Ask, replicas: Replicas, num_bytes: int
    ) -> AsyncIterator[tuple[Response, AsyncGenerator[IndexedDelta]]]:
        """The response to an ask that came in so many bytes, and what the engines add to it; nothing is left in them
        when the block ends."""
        model, response_id = replicas.model, f"{endpoint.id_prefix}{uuid.uuid4().hex}"
        prepare = partial(endpoint.completions, ask, response_id, model, model.prompt_limit)
        # Tokenizers and templates may take long: not in the event loop, and with a limit.
        completions = await self._texts.run(prepare, num_bytes)
        response = endpoint.respond(ask, completions, response_id, model)
        with self._admission.request(num_sequences=len(completions) - 1):
            async with contextlib.aclosing(replicas.generate_all(completions)) as deltas:
                yield response, deltas


async def whole(response: Response, deltas: AsyncGenerator[IndexedDelta]) -> dict[str, Any]:
    """The response's body, once all of its completions have ended. Raises AbortedError."""
    async for index, delta in deltas:
        response.completions[index].add(delta)
    if any(completion.finish_reason is FinishReason.ABORT for completion in response.completions):
        raise AbortedError()
    return response.whole()
