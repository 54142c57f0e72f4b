"""Thin clients of ``jaxserve.v1``. They need grpcio alone; they load no jax."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.server.messages import NO_TOKEN_LIMIT
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from grpc import _CallIterator as CallIterator

DEFAULT_TARGET = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
POLL_SECONDS = 0.1
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A server that has just come up should be found soon.
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

ChatMessages = Sequence[Mapping[str, str]]


@dataclass
class StreamTiming:
    """A client's clock over one stream; starts when created."""

    started_seconds: float = field(default_factory=time.monotonic)
    token_seconds: list[float] = field(default_factory=list)

    def record(self, response: pb.GenerateResponse) -> None:
        if response.token_ids:
            self.token_seconds.append(time.monotonic())

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token."""
        return self.token_seconds[0] - self.started_seconds if self.token_seconds else None

    @property
    def tbt_seconds(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in pairwise(self.token_seconds)]


class Client:
    """One channel to one server; safe to share between threads. A failed call raises grpc.RpcError."""

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()

    def ready(self, timeout_seconds: float = 5.0) -> bool:
        """Whether the server answers and is past its warm-up and not draining."""
        request = health_pb2.HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["InferenceService"].full_name)
        try:
            status = self._health.Check(request, timeout=timeout_seconds).status
        except grpc.RpcError:
            return False
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def wait_ready(self, timeout_seconds: float) -> None:
        """Wait for the end of the warm-up. Raises TimeoutError."""
        deadline_seconds = time.monotonic() + timeout_seconds
        while not self.ready():
            if time.monotonic() > deadline_seconds:
                raise TimeoutError(f"no server is ready at {self.target} after {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def generate(
        self,
        prompt: str | Sequence[int] | ChatMessages,
        *,
        request_id: str = "",
        model: str = "",
        timeout_seconds: float | None = None,
        **sampling: Any,
    ) -> CallIterator[pb.GenerateResponse]:
        """Continue a text, token ids, or a chat of {"role", "content"} messages; the call starts at once.

        ``sampling`` takes the names of jaxserve.SamplingParams. Iterate for the responses; ``cancel()`` on the result
        ends the request on the server.
        """
        return self._stub.Generate(_generate_request(prompt, request_id, model, sampling), timeout=timeout_seconds)

    def abort(self, request_id: str) -> bool:
        """End a request from outside its call; False when it is not in flight."""
        return self._stub.Abort(pb.AbortRequest(request_id=request_id)).aborted

    def model_info(self) -> pb.GetModelInfoResponse:
        return self._stub.GetModelInfo(pb.GetModelInfoRequest())

    def tokenize(self, prompt: str | ChatMessages) -> list[int]:
        """The token ids that ``generate`` would see."""
        return list(self._stub.Tokenize(pb.TokenizeRequest(**_prompt_field(prompt))).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._stub.Detokenize(request).text


class AsyncClient:
    """``Client.generate`` for asyncio, for hundreds of streams in one thread. Create it inside the event loop."""

    def __init__(self, target: str = DEFAULT_TARGET) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._channel.close()

    def generate(
        self, prompt: str | Sequence[int] | ChatMessages, *, request_id: str = "", model: str = "", **sampling: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """As ``Client.generate``; a failed call raises grpc.aio.AioRpcError."""
        call: AsyncIterator[pb.GenerateResponse] = self._stub.Generate(
            _generate_request(prompt, request_id, model, sampling)
        )
        return call


def _generate_request(
    prompt: str | Sequence[int] | ChatMessages, request_id: str, model: str, sampling: dict[str, Any]
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id, model=model, sampling_params=_sampling_message(sampling), **_prompt_field(prompt)
    )


def _prompt_field(prompt: str | Sequence[int] | ChatMessages) -> dict[str, Any]:
    """The member of the ``prompt`` oneof that a prompt's type stands for."""
    if isinstance(prompt, str):
        return {"text": prompt}
    messages = [pb.ChatMessage(**item) for item in prompt if isinstance(item, Mapping)]
    if messages:
        return {"chat": pb.Chat(messages=messages)}
    return {"token_ids": pb.TokenIds(ids=[item for item in prompt if isinstance(item, int)])}


def _sampling_message(sampling: dict[str, Any]) -> pb.SamplingParams:
    sampling = dict(sampling)
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    # As in SamplingParams: None is no limit, while a field left out has the default.
    if sampling.get("max_tokens", 0) is None:
        sampling["max_tokens"] = NO_TOKEN_LIMIT
    return pb.SamplingParams(**sampling)
