"""Streams of both doors for load generators: whoever iterates gets the number of new tokens, event by event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

from jaxserve.server.client import AsyncClient
from jaxserve.server.process import ServerProcess
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb

DOORS = ("gRPC", "HTTP")


class StreamError(RuntimeError):
    """A stream was refused, or ended before its end; the message is the server's."""


class AbortedStreamError(StreamError):
    """The request was aborted from elsewhere."""


def open_stream(
    server: ServerProcess, client: AsyncClient, door: str, prompt: str, num_tokens: int, request_id: str = ""
) -> AsyncGenerator[int, None]:
    """Greedy outputs of forced length through one of DOORS; only gRPC's requests have the name."""
    if door == "gRPC":
        return grpc_stream(client, prompt, num_tokens, request_id)
    assert server.url is not None
    return http_stream(server.url, prompt, num_tokens)


async def grpc_stream(client: AsyncClient, prompt: str, num_tokens: int, request_id: str) -> AsyncGenerator[int, None]:
    """Closing it cancels the call. Raises grpc.aio.AioRpcError and AbortedStreamError."""
    call: Any = client.generate(prompt, request_id=request_id, max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    try:
        async for response in call:
            if response.finish_reason == pb.FINISH_REASON_ABORT:
                raise AbortedStreamError("aborted")
            yield len(response.token_ids)
    finally:
        call.cancel()


async def http_stream(url: str, prompt: str, num_tokens: int) -> AsyncGenerator[int, None]:
    """A completion over a connection of its own; closing it drops the connection. Raises StreamError and OSError."""
    body = {
        "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        num_seen = 0
        status = await reader.readline()
        if b" 200 " not in status:
            raise StreamError(f"{status!r} {await reader.read()!r:.300}")
        # The door sends each event as a chunk of its own, so its line is whole.
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise StreamError(event["error"]["message"])
                num_new = event["usage"]["completion_tokens"] - num_seen
                num_seen += num_new
                yield num_new
        raise StreamError(f"the stream ended after {num_seen} of {num_tokens} tokens")
    finally:
        writer.close()
