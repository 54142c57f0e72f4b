"""Thin clients of ``jaxserve.v1``. They need grpcio alone; they load no jax."""

from __future__ import annotations

import ipaddress
import json
import operator
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import grpc
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.errors import RequestError
from jaxserve.server.messages import MAX_UINT32, NO_TOKEN_LIMIT
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.structured_outputs import StructuredOutputsParams

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
NO_PROXY = ("grpc.enable_http_proxy", 0)

ChatMessages = Sequence[Mapping[str, str]]
Prompt = str | Iterable[SupportsIndex] | ChatMessages
"""A text, token ids (numpy's as well), or a chat of {"role", "content"} messages."""


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
    """One channel to one server; safe to share between threads.

    A failed call raises grpc.RpcError. What cannot be sent as it was given raises RequestError, with its place.
    ``api_key``: for a server that asks for one, that of the variable JAXSERVE_API_KEY by default. ``ca_file``: the
    authority (PEM) of a server with TLS.
    """

    def __init__(self, target: str = DEFAULT_TARGET, *, api_key: str | None = None, ca_file: str | None = None) -> None:
        self.target = target
        self._metadata = _metadata(api_key)
        options = _channel_options(target)
        if ca_file is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, _credentials(ca_file), options=options)
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
        return self._obstacle(timeout_seconds) is None

    def wait_ready(self, timeout_seconds: float) -> None:
        """Wait for the end of the warm-up. Raises TimeoutError, which says what was in the way."""
        deadline_seconds = time.monotonic() + timeout_seconds
        while (obstacle := self._obstacle()) is not None:
            if time.monotonic() > deadline_seconds:
                raise TimeoutError(f"no server is ready at {self.target} after {timeout_seconds:g} s: {obstacle}")
            time.sleep(POLL_SECONDS)

    def _obstacle(self, timeout_seconds: float = 5.0) -> str | None:
        """Why no call would be served now."""
        request = health_pb2.HealthCheckRequest(service=pb.DESCRIPTOR.services_by_name["InferenceService"].full_name)
        try:
            status = self._health.Check(request, timeout=timeout_seconds).status
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        serving = status == health_pb2.HealthCheckResponse.SERVING
        return None if serving else "it warms up or drains"

    def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        model: str = "",
        timeout_seconds: float | None = None,
        **sampling: Any,
    ) -> CallIterator[pb.GenerateResponse]:
        """Continue a prompt; the call starts at once.

        ``sampling`` takes the names of jaxserve.SamplingParams; None leaves a field to the server, but for max_tokens,
        where it is no limit. Iterate for the responses; ``cancel()`` on the result
        ends the request on the server.
        """
        request = _generate_request(prompt, request_id, model, sampling)
        return self._stub.Generate(request, timeout=timeout_seconds, metadata=self._metadata)

    def abort(self, request_id: str) -> bool:
        """End a request from outside its call; False when it is not in flight."""
        return self._stub.Abort(pb.AbortRequest(request_id=request_id), metadata=self._metadata).aborted

    def model_info(self) -> pb.GetModelInfoResponse:
        return self._stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=self._metadata)

    def tokenize(self, prompt: str | ChatMessages) -> list[int]:
        """The token ids that ``generate`` would see."""
        field = _prompt_field(prompt)
        if "token_ids" in field:
            raise RequestError(f"prompt must be a text or a chat to be tokenized, got {prompt!r:.80}")
        return list(self._stub.Tokenize(pb.TokenizeRequest(**field), metadata=self._metadata).token_ids)

    def detokenize(self, token_ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True) -> str:
        ids = _token_ids("token_ids", token_ids)
        request = pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
        return self._stub.Detokenize(request, metadata=self._metadata).text


class AsyncClient:
    """``Client`` for asyncio, for hundreds of requests in one thread. Create it inside the event loop.

    A failed call raises grpc.aio.AioRpcError.
    """

    def __init__(self, target: str = DEFAULT_TARGET, *, api_key: str | None = None, ca_file: str | None = None) -> None:
        self._metadata = _metadata(api_key)
        options = _channel_options(target)
        if ca_file is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, _credentials(ca_file), options=options)
        self._stub = pb_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    def generate(
        self, prompt: Prompt, *, request_id: str = "", model: str = "", **sampling: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """As ``Client.generate``."""
        call: AsyncIterator[pb.GenerateResponse] = self._stub.Generate(
            _generate_request(prompt, request_id, model, sampling), metadata=self._metadata
        )
        return call

    async def respond(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The response's body to a body of OpenAI's API, such as that of "/v1/completions"."""
        request = pb.RespondRequest(path=path, body=json.dumps(body).encode())
        response: dict[str, Any] = json.loads((await self._stub.Respond(request, metadata=self._metadata)).body)
        return response


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    api_key = api_key or os.environ.get("JAXSERVE_API_KEY")
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _credentials(ca_file: str) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(Path(ca_file).read_bytes())


def _channel_options(target: str) -> list[tuple[str, int]]:
    """No proxy of the environment reaches this machine: its loopback would be the proxy's own."""
    return [*CHANNEL_OPTIONS, NO_PROXY] if _is_local(target) else CHANNEL_OPTIONS


def _is_local(target: str) -> bool:
    """Whether a gRPC target is a Unix socket or on the loopback."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    address = re.sub(r"^(dns|ipv4|ipv6):(//[^/]*/)?", "", target)
    host = re.sub(r":\d+(,.*)?$", "", address).strip("[]")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return ip.is_loopback or ip.is_unspecified


def _generate_request(prompt: Prompt, request_id: str, model: str, sampling: dict[str, Any]) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=_text("request_id", request_id),
        model=_text("model", model),
        sampling_params=_sampling_message(sampling),
        **_prompt_field(prompt),
    )


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    """The member of the ``prompt`` oneof that a prompt's type stands for."""
    if isinstance(prompt, str):
        return {"text": _text("prompt", prompt)}
    items = _items("prompt", prompt)
    if any(isinstance(item, Mapping) for item in items):
        return {"chat": pb.Chat(messages=[_message(f"prompt[{i}]", item) for i, item in enumerate(items)])}
    return {"token_ids": pb.TokenIds(ids=_token_ids("prompt", items))}


def _message(name: str, item: Any) -> pb.ChatMessage:
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise RequestError(f"{name} must be a message of role and content, got {item!r:.80}")
    return pb.ChatMessage(
        role=_text(f"{name}['role']", item["role"]), content=_text(f"{name}['content']", item["content"])
    )


def _sampling_message(sampling: dict[str, Any]) -> pb.SamplingParams:
    message = pb.SamplingParams()
    fields = pb.SamplingParams.DESCRIPTOR.fields_by_name
    for name, value in sampling.items():
        if name not in fields:
            raise RequestError(f"{name} is no sampling parameter; those are {', '.join(fields)}")
        if fields[name].is_repeated:
            if value is not None:
                _add_items(message, name, fields[name], value)
        elif name == "structured_outputs":
            if (asked := StructuredOutputsParams.of(value)) is not None:
                message.structured_outputs.CopyFrom(_structured_outputs(asked))
        elif value is not None:
            setattr(message, name, _scalar(name, fields[name], value))
        elif name == "max_tokens":  # as in SamplingParams: None is no limit
            message.max_tokens = NO_TOKEN_LIMIT
    return message


def _add_items(message: pb.SamplingParams, name: str, field: Any, value: Any) -> None:
    if name == "logit_bias":
        _add_bias(message, value)
        return
    items = [value] if name == "stop" and isinstance(value, str) else _items(name, value)
    if field.type == FieldDescriptor.TYPE_STRING:
        items = [_text(f"{name}[{i}]", text) for i, text in enumerate(items)]
    else:
        items = _token_ids(name, items)
    getattr(message, name).extend(items)


def _add_bias(message: pb.SamplingParams, bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must be a mapping, got {bias!r:.80}")
    for token_id, value in bias.items():
        message.logit_bias[_integer("logit_bias: token id", token_id, 0, MAX_UINT32)] = _number("logit_bias", value)


def _structured_outputs(asked: StructuredOutputsParams) -> pb.StructuredOutputs:
    message, value = pb.StructuredOutputs(), getattr(asked, asked.name)
    if asked.name == "choice":
        message.choice.choices.extend(value)
    else:
        setattr(message, asked.name, value)
    return message


def _scalar(name: str, field: Any, value: Any) -> bool | int | float | str:
    """A scalar for ``field``; protobuf itself would turn some into others, True into 1 and 2 into True."""
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be True or False, got {value!r:.80}")
        return value
    if field.type == FieldDescriptor.TYPE_STRING:
        return _text(name, value)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return _number(name, value)
    bits = 64 if field.type == FieldDescriptor.TYPE_INT64 else 32
    return _integer(name, value, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _number(name: str, value: Any) -> float:
    number = None if isinstance(value, bool | str) else _converted(float, value)
    if number is None:
        raise RequestError(f"{name} must be a number, got {value!r:.80}")
    return number


def _token_ids(name: str, ids: Any) -> list[int]:
    return [_integer(f"{name}[{i}]", item, 0, MAX_UINT32) for i, item in enumerate(_items(name, ids))]


def _integer(name: str, value: Any, low: int, high: int) -> int:
    number = None if isinstance(value, bool) else _converted(operator.index, value)
    if number is None or not low <= number <= high:
        raise RequestError(f"{name} must be an integer in [{low}, {high}], got {value!r:.80}")
    return number


def _converted[Number](convert: Callable[[Any], Number], value: Any) -> Number | None:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _encodable(value):
        raise RequestError(f"{name} must be a string of valid Unicode, got {value!r:.80}")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def _items(name: str, value: Any) -> list[Any]:
    """What an iterable holds, in its order; not what a text or a mapping would be taken for."""
    unordered = isinstance(value, str | bytes | bytearray | Mapping | Set)
    items = None if unordered else _converted(iter, value)
    if items is None:
        raise RequestError(f"{name} must be a list, got {value!r:.80}")
    return list(items)
