"""Hostile gRPC requests from the descriptors of the protocols that are served, and what no answer to them may be."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from hypothesis import strategies as st

from jaxserve.server.proto.inference import grpc_service_pb2 as kserve
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as own
from jaxserve.server.proto.vllm import vllm_engine_pb2 as vllm

CALL_SECONDS = 30
"""A call that takes longer hangs."""
FAULTS = (StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE)
"""UNAVAILABLE, too: the server is warm, and does not drain."""
INTEGERS = {
    **dict.fromkeys((Field.TYPE_INT32, Field.TYPE_SINT32, Field.TYPE_SFIXED32), (-(2**31), 2**31 - 1)),
    **dict.fromkeys((Field.TYPE_INT64, Field.TYPE_SINT64, Field.TYPE_SFIXED64), (-(2**63), 2**63 - 1)),
    **dict.fromkeys((Field.TYPE_UINT32, Field.TYPE_FIXED32), (0, 2**32 - 1)),
    **dict.fromkeys((Field.TYPE_UINT64, Field.TYPE_FIXED64), (0, 2**64 - 1)),
}
WORDS = (
    "", "a", "\0", "\ufffd\U0001f600", "{{ 7 }}{% raw %}", "<|im_start|>", "x" * 3000, "id-1", "1", "text_input",
    "stream", "exclude_input_in_output", "sampling_parameters", "text_output", "BYTES", "BOOL", "FP32", "{}", "[]",
    "nan", '{"max_tokens": 2}', '{"temperature": 1e999}', '{"stop": ["", "a"]}', '{"n": 3, "seed": -1}',
    '{"max_tokens": null}', "triton_enable_empty_final_response", "user", "assistant",
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-30, 1e38, 2.0, 100.0, float("inf"), float("-inf"), float("nan"))
MAX_ITEMS = 4


def _seeds() -> dict[str, list[Message]]:
    """Requests that are served, by the full names of their types."""
    tensor = kserve.ModelInferRequest.InferInputTensor
    inputs = {"text_input": b"abc", "sampling_parameters": b'{"max_tokens": 3, "ignore_eos": true}'}
    kserve_inputs = [
        tensor(name=name, datatype="BYTES", shape=[1], contents={"bytes_contents": [value]})
        for name, value in inputs.items()
    ]
    raw = kserve.ModelInferRequest(
        inputs=[tensor(name=name, datatype="BYTES", shape=[1]) for name in inputs],
        raw_input_contents=[struct.pack("<I", len(value)) + value for value in inputs.values()],
    )
    sampling = own.SamplingParams(max_tokens=3, temperature=1.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    messages: list[Message] = [
        own.GenerateRequest(text="abc", sampling_params=sampling),
        own.GenerateRequest(request_id="id-1", token_ids={"ids": [97, 98]}, sampling_params=sampling),
        own.GenerateRequest(chat={"messages": [{"role": "user", "content": "abc"}]}, sampling_params=sampling),
        own.TokenizeRequest(text="abc"),
        own.DetokenizeRequest(token_ids=[97, 98]),
        own.RespondRequest(path="/v1/completions", body=b'{"prompt": "abc", "max_tokens": 3, "ignore_eos": true}'),
        kserve.ModelInferRequest(inputs=kserve_inputs),
        raw,
        vllm.GenerateRequest(
            tokenized={"input_ids": [97, 98]},
            sampling_params={"max_tokens": 3, "n": 2, "logprobs": 1, "ignore_eos": True},
            stream=True,
        ),
        vllm.GenerateRequest(request_id="id-1", text="abc", sampling_params={"max_tokens": 3}),
    ]
    seeds: dict[str, list[Message]] = {}
    for message in messages:
        seeds.setdefault(message.DESCRIPTOR.full_name, []).append(message)
    return seeds


SEEDS = _seeds()
SERVICES: Mapping[str, Any] = {
    service.full_name: service
    for module in (own, kserve, vllm)
    for service in module.DESCRIPTOR.services_by_name.values()
}


@dataclass(frozen=True)
class Case:
    """One call: the messages it sends, and whether its caller leaves after the first answer."""

    method: MethodDescriptor
    messages: list[bytes]
    leaves: bool

    def __repr__(self) -> str:
        return f"{self.method.full_name} {self.messages!r}{', left' * self.leaves}"


def cases(service: str) -> st.SearchStrategy[Case]:
    """Calls of any method, most of those that take more than a name near to one that is served."""
    methods = list(SERVICES[service].methods)
    with_seeds = [method for method in methods if method.input_type.full_name in SEEDS]
    return st.sampled_from([*methods, *with_seeds * 3]).flatmap(
        lambda method: st.builds(
            Case,
            st.just(method),
            st.lists(payloads(method), min_size=1, max_size=3 if method.client_streaming else 1),
            st.booleans() if method.server_streaming else st.just(False),
        )
    )


def payloads(method: MethodDescriptor) -> st.SearchStrategy[bytes]:
    """Serialized requests of a method, some of them damaged, and bytes that never were one."""
    whole = _mutated(method.input_type).map(lambda message: message.SerializePartialToString())
    return st.one_of(whole, whole, whole, _damaged(whole), st.binary(max_size=200))


@st.composite
def _damaged(draw: Callable[..., Any], whole: st.SearchStrategy[bytes]) -> bytes:
    data, random_bytes = bytearray(draw(whole)), random.Random(draw(st.integers(0, 2**32)))
    for _ in range(min(len(data), 3)):
        data[random_bytes.randrange(len(data))] = random_bytes.randrange(256)
    return bytes(data[: random_bytes.randint(0, len(data))]) if random_bytes.random() < 0.5 else bytes(data)


@st.composite
def _mutated(draw: Callable[..., Any], descriptor: Any) -> Message:
    message = GetMessageClass(descriptor)()
    if descriptor.full_name in SEEDS:
        message.CopyFrom(draw(st.sampled_from(SEEDS[descriptor.full_name])))
    _mutate(draw, message, percent=draw(st.sampled_from((0, 3, 10, 40))), depth=3)
    return message


def _mutate(draw: Callable[..., Any], message: Message, percent: int, depth: int) -> None:
    """Change about this part of a message's fields, those of the messages in it included."""
    for field in message.DESCRIPTOR.fields:
        if draw(st.integers(0, 99)) >= 100 - percent:
            message.ClearField(field.name)
            if draw(st.integers(0, 3)):
                _set(draw, message, field, percent, depth)
        elif field.type == Field.TYPE_MESSAGE and not _is_map(field) and depth:
            inner = getattr(message, field.name)
            for part in inner if field.is_repeated else [inner] if message.HasField(field.name) else []:
                _mutate(draw, part, percent, depth - 1)


def _set(draw: Callable[..., Any], message: Message, field: Field, percent: int, depth: int) -> None:
    value = getattr(message, field.name)
    if _is_map(field):
        key, item = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for name in draw(st.lists(_scalar(key), max_size=MAX_ITEMS)):
            if item.type == Field.TYPE_MESSAGE:
                _mutate(draw, value[name], 50, depth - 1)
            else:
                value[name] = draw(_scalar(item))
    elif field.type == Field.TYPE_MESSAGE:
        for _ in range(draw(st.integers(0, MAX_ITEMS))) if field.is_repeated else [None]:
            part = value.add() if field.is_repeated else value
            part.SetInParent()
            if depth:
                _mutate(draw, part, max(percent, 50), depth - 1)
    elif field.is_repeated:
        items = draw(st.lists(_scalar(field), max_size=MAX_ITEMS))
        value.extend(items * draw(st.sampled_from((1, 1, 1, 500))))
    else:
        setattr(message, field.name, draw(_scalar(field)))


def _is_map(field: Field) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _scalar(field: Field) -> st.SearchStrategy[Any]:
    if field.type in INTEGERS:
        low, high = INTEGERS[field.type]
        near = [value for value in (-2, -1, 0, 1, 2, 3, 20, 21, 97, 128, 255, 256, 1024) if low <= value <= high]
        return st.one_of(st.sampled_from([*near, low, high]), st.integers(low, high))
    match field.type:
        case Field.TYPE_BOOL:
            return st.booleans()
        case Field.TYPE_STRING:
            return st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
        case Field.TYPE_BYTES:
            words = [word.encode() for word in WORDS]
            packed = [struct.pack("<I", len(word)) + word for word in words]
            return st.one_of(st.sampled_from([*words, *packed]), st.binary(max_size=40))
        case Field.TYPE_FLOAT | Field.TYPE_DOUBLE:
            width = 32 if field.type == Field.TYPE_FLOAT else 64
            return st.one_of(st.sampled_from(FLOATS), st.floats(width=width))
        case Field.TYPE_ENUM:
            return st.sampled_from([value.number for value in field.enum_type.values])
    raise AssertionError(f"no values for {field.full_name} of type {field.type}")


def check(channel: grpc.Channel, case: Case) -> StatusCode:
    """Make the call; it must end in time, and not with a fault of the server."""
    path = f"/{case.method.containing_service.full_name}/{case.method.name}"
    code, details = StatusCode.OK, ""
    try:
        if case.method.client_streaming:
            responses = channel.stream_stream(path)(iter(case.messages), timeout=CALL_SECONDS)
        elif case.method.server_streaming:
            responses = channel.unary_stream(path)(case.messages[0], timeout=CALL_SECONDS)
        else:
            responses = iter([channel.unary_unary(path)(case.messages[0], timeout=CALL_SECONDS)])
        if case.leaves:
            with contextlib.suppress(StopIteration):
                next(responses)
            responses.cancel()
        else:
            for _ in responses:
                pass
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
    assert code not in FAULTS, f"{code.name}: {details} for {case}"
    assert len(details.encode()) <= 1000, f"{len(details)} characters of details for {case}"
    return code
