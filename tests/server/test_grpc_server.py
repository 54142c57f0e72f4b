"""The gRPC server over a fake engine: protocol, status codes, cancellation, health, drain and failure."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections import Counter

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.request import FinishReason, Logprob, RequestDelta, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import MAX_TEXT_TOKENS
from jaxserve.server import door, listener, messages, text_threads
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.config import ServerConfig
from jaxserve.server.listener import LIVE, SERVICE_NAME
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.serve import Server
from jaxserve.server.text_threads import LONG_THREADS, SHORT_BYTES

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CHAT = [{"role": "user", "content": "hi"}]


def health(target: str, service: str) -> int:
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


# ---- streaming


def test_generate_streams_text_tokens_and_usage(client):
    responses = list(client.generate("hello", max_tokens=4, request_id="a"))
    assert [r.text for r in responses] == ["x"] * 4
    assert [list(r.token_ids) for r in responses] == [[120]] * 4
    assert {r.request_id for r in responses} == {"a"}
    assert all(r.finish_reason == pb.FINISH_REASON_UNSPECIFIED and not r.HasField("usage") for r in responses[:-1])
    last = responses[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.output_tokens) == (5, 4)
    assert 0 < last.usage.scheduling_delay_seconds <= last.usage.ttft_seconds < 1
    assert last.WhichOneof("stop_reason") is None


@pytest.mark.parametrize(("prompt", "num_tokens"), [("abc", 3), ([5, 6, 7, 8], 4), (CHAT, len("<user>hi"))])
def test_every_kind_of_prompt(client, prompt, num_tokens):
    *_, last = client.generate(prompt, max_tokens=2)
    assert last.usage.prompt_tokens == num_tokens
    assert last.request_id  # made by the server


def test_defaults_are_those_of_sampling_params(client):
    assert len(list(client.generate("abc"))) == 16


def test_fields_left_out_have_the_models_defaults(server, client):
    server.engine.sampling_defaults |= {"temperature": 0.5, "top_k": 9, "max_tokens": 7}
    assert len(list(client.generate("abc"))) == 7
    assert len(list(client.generate([2] * 995))) == 5, "cut to what max_model_len leaves"
    stream = client.generate("abc", request_id="a", max_tokens=100, temperature=0.0)
    next(iter(stream))
    assert server.engine.running["a"].params == SamplingParams(temperature=0.0, top_k=9, max_tokens=100)
    stream.cancel()
    stream = client.generate("abc", request_id="b", max_tokens=None, top_k=0)
    next(iter(stream))
    assert server.engine.running["b"].params == SamplingParams(temperature=0.5, max_tokens=None)
    stream.cancel()


def test_max_tokens_none_goes_on_to_max_model_len(client):
    *_, last = client.generate([2] * 990, max_tokens=None)
    assert last.usage.output_tokens == 10


def test_stop_reason(client):
    (only,) = client.generate("abc", stop="x")
    assert only.finish_reason == pb.FINISH_REASON_STOP
    assert only.stop_string == "x"


def test_logprobs(client):
    first, second = client.generate("ab", max_tokens=2, logprobs=1, prompt_logprobs=1)
    assert [len(p.candidates) for p in first.prompt_logprobs] == [0, 2]
    assert not second.prompt_logprobs
    chosen, other = second.logprobs[0].candidates
    assert (chosen.token_id, chosen.logprob, chosen.rank) == (120, -0.5, 1)
    assert (other.token_id, other.logprob, other.rank) == (121, -1.5, 2)


def test_concurrent_streams(client):
    calls = [client.generate("abc", max_tokens=n) for n in range(1, 33)]
    assert [len(list(call)) for call in calls] == list(range(1, 33))


def test_tokenize_and_detokenize(client, fails):
    assert client.tokenize("abc") == [97, 98, 99]
    assert client.tokenize(CHAT) == [ord(c) for c in "<user>hi"]
    assert client.detokenize([97, 0, 98]) == "ab"
    assert client.detokenize([97, 0, 98], skip_special_tokens=False) == "a\0b"
    assert client.detokenize([97, 128, 159, 98]) == "ab", "a padded vocabulary's ids have no text"
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: client.detokenize([97, 160]))
    assert message == "token_ids must be in [0, 159], got 160"


def test_model_info(client):
    info = client.model_info()
    assert (info.model, info.architecture, info.dtype, info.scheduler) == ("fake", "Fake", "float32", "sarathi")
    assert (info.vocab_size, info.max_model_len, info.token_budget, info.max_num_seqs) == (160, 1000, 256, 16)
    assert list(info.eos_token_ids) == [0]


# ---- bad requests: each fails alone


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": -0.1}, "temperature must be in [0, 100], got -0.1"),
        ({"temperature": float("nan")}, "temperature must be in [0, 100], got nan"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"top_k": -2}, "top_k must be an integer in [-1, 2147483647], got -2"),
        ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5"),
        ({"seed": 2**31}, "seed must be an integer in [0, 2147483647], got 2147483648"),
        ({"max_tokens": 0}, "max_tokens must be an integer in [1, 2147483647], got 0"),
        ({"logprobs": -2}, "logprobs must be an integer in [-1, 2147483647], got -2"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or at least 1, got 0"),
        ({"stop": [""]}, "stop must be at most 16 non-empty strings"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids must be an integer in [0, 2147483647], got 2147483648"),
    ],
)
def test_bad_sampling_params_name_field_and_limit(client, fails, sampling, message):
    assert message in fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", **sampling)))
    assert list(client.generate("abc", max_tokens=1))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt must hold at least one token, got none"),
        ([], "prompt must hold at least one token, got none"),
        ([2] * 1000, "prompt of 1000 tokens exceeds max_model_len 1000"),
    ],
)
def test_bad_prompts(client, fails, prompt, message):
    assert message in fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate(prompt)))


def test_prompt_left_out(client, fails):
    call = client._stub.Generate
    assert (
        fails(StatusCode.INVALID_ARGUMENT, lambda: list(call(pb.GenerateRequest()))) == "prompt must be given, got none"
    )


def test_request_ids(client, fails):
    long_id = "a" * 129
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", request_id=long_id)))
    assert message == "request_id must have at most 128 characters, got 129"
    running = client.generate("abc", request_id="same", max_tokens=None)
    next(iter(running))
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", request_id="same")))
    assert "request_id must be unique" in message
    assert next(iter(running)).text == "x"
    running.cancel()


def test_unknown_model(client, fails):
    message = fails(StatusCode.NOT_FOUND, lambda: list(client.generate("abc", model="other")))
    assert "'fake'" in message
    assert "'other'" in message
    assert list(client.generate("abc", model="fake", max_tokens=1))


def test_metadata_over_the_limit(client, fails):
    """gRPC's own: 16 KiB at most."""
    client._metadata = (("x", "a" * 2**15),)
    message = fails(StatusCode.RESOURCE_EXHAUSTED, client.model_info)
    assert "metadata size exceeds hard limit" in message
    client._metadata = ()
    assert len(list(client.generate("abc", max_tokens=2))) == 2


def test_unknown_method(client, fails):
    call = client._channel.unary_unary(f"/{SERVICE_NAME}/Nothing")
    fails(StatusCode.UNIMPLEMENTED, lambda: call(b""))


def test_message_over_the_limit(make_server, fails):
    server = make_server(max_message_bytes=1000)
    with Client(server.target) as client:
        fails(StatusCode.RESOURCE_EXHAUSTED, lambda: list(client.generate("a" * 2000)))
        assert list(client.generate("abc", max_tokens=1))


@pytest.mark.parametrize("character", ["s", "\N{GRINNING FACE}"])
def test_a_long_error_fits_the_headers(client, fails, character):
    stop = [character * 4000, ""]
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", stop=stop)))
    assert message.startswith("stop must be at most 16 non-empty strings, got ")
    assert door.MAX_STATUS_BYTES - 4 < len(message.encode()) <= door.MAX_STATUS_BYTES


@pytest.mark.parametrize("prompt", ["break", [1]])  # the fake tokenizer and the fake engine raise on these
def test_exceptions_do_not_leak(server, client, fails, prompt):
    assert fails(StatusCode.INTERNAL, lambda: list(client.generate(prompt))) == "internal error"
    assert health(server.target, SERVICE_NAME) == SERVING
    assert list(client.generate("abc", max_tokens=1))


@pytest.mark.parametrize(
    ("request_message", "message"),
    [
        ({"text": "a" * 2_000_000}, "request of 2000004 bytes exceeds 1048576 bytes"),
        ({"token_ids": pb.TokenIds(ids=[2] * 1001)}, "prompt of 1001 items exceeds max_model_len 1000"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage()] * 1001)}, "messages of 1001 items exceeds max_model_len 1000"),
    ],
)
def test_what_is_too_long_is_refused_untouched(server, client, fails, monkeypatch, request_message, message):
    """Nothing is converted, rendered or tokenized first."""
    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(server.engine.tokenizer, name, None)
    call = client._stub.Generate
    assert message in fails(StatusCode.INVALID_ARGUMENT, lambda: list(call(pb.GenerateRequest(**request_message))))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"stop": [""] * 17}, "stop must be at most 16 values, got 17"),
        ({"bad_words": ["a"] * 129}, "bad_words must be at most 128 values, got 129"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias must be at most 300 values, got 301"),
        ({"stop_token_ids": [2] * 161}, "stop_token_ids must be at most 160 token ids, got 161"),
    ],
)
def test_too_many_stops_are_refused_untouched(client, fails, sampling, message):
    assert fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", **sampling))) == message


def test_texts_beyond_the_window_can_be_tokenized(client, fails):
    text = "a" * 5000
    assert client.detokenize(client.tokenize(text)) == text
    limit = MAX_TEXT_TOKENS
    too_long = f"of {limit + 1} {{}} exceeds the limit of {limit}"
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: client.tokenize("a" * (limit + 1)))
    assert message == "prompt " + too_long.format("tokens")
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: client.detokenize([2] * (limit + 1)))
    assert message == "token_ids " + too_long.format("items")


def test_a_request_that_is_no_message(client, fails):
    call = client._channel.unary_unary(f"/{SERVICE_NAME}/Tokenize")
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: call(b"\xff\xff"))
    assert message == "the request is no message of this method"


def test_short_texts_pass_long_ones(server, client, fails, monkeypatch):
    """However many long ones there are; those that get no turn are told to come back."""
    monkeypatch.setattr(text_threads, "TIMEOUT_SECONDS", 0.5)
    tokenizer, release = server.engine.tokenizer, threading.Event()
    encode = tokenizer.encode

    def slow(text: str, **options) -> list[int]:
        return (len(text) > SHORT_BYTES and release.wait(10) and [2]) or encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", slow)
    calls = [client.generate("a" * 20_000) for _ in range(LONG_THREADS + 4)]
    assert list(client.generate("abc", max_tokens=1))
    assert client.tokenize("abc") == [97, 98, 99]
    codes = []
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        codes.append(caught.value.code())
        if codes[-1] is StatusCode.RESOURCE_EXHAUSTED:
            assert "retry-after-ms" in dict(caught.value.trailing_metadata())
    assert codes.count(StatusCode.INVALID_ARGUMENT) == LONG_THREADS
    assert codes.count(StatusCode.RESOURCE_EXHAUSTED) == 4
    release.set()


# ---- responses that would be too large


def test_large_outputs_are_divided(make_server):
    server = make_server(max_message_bytes=1500)
    with Client(server.target) as client:
        *parts, first, last = client.generate([2] * 300, max_tokens=2, prompt_logprobs=20)
        assert parts
        assert not any(part.token_ids or part.finish_reason for part in parts)
        assert first.token_ids
        positions = [position for part in (*parts, first) for position in part.prompt_logprobs]
        assert [len(position.candidates) for position in positions] == [0] + [2] * 299
        assert not last.prompt_logprobs


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(max_size=3000),
    num_positions=st.integers(0, 60),
    num_top=st.integers(0, 20),
    num_tokens=st.integers(1, 80),
    stop=st.text(min_size=1, max_size=300),
    limit=st.integers(4000, 20_000),
)
def test_no_response_exceeds_the_limit_and_none_is_lost(text, num_positions, num_top, num_tokens, stop, limit):
    params = SamplingParams(prompt_logprobs=num_top, logprobs=num_top, stop=stop)
    entry = {2**31 + i: Logprob(-1.5, 2**31) for i in range(1 + num_top)}
    delta = RequestDelta(
        request_id="\N{GRINNING FACE}" * 128, token_ids=[2**31] * num_tokens, text=text, stop_reason=stop,
        logprobs=[entry] * num_tokens,
        prompt_logprobs=[None, *[entry] * num_positions], finish_reason=FinishReason.STOP,
        metrics=RequestMetrics(0.0, first_scheduled_seconds=1.0, token_seconds=[2.0]), num_prompt_tokens=2**31,
    )  # fmt: skip
    room = messages.ResponseRoom(delta.request_id, params, limit)
    responses = list(messages.generate_responses(delta, 2**31, room))
    assert max(response.ByteSize() for response in responses) <= limit
    assert "".join(response.text for response in responses) == text
    positions = [position for response in responses for position in response.prompt_logprobs]
    assert positions == [messages.position_logprobs(position) for position in delta.prompt_logprobs]
    assert sum(len(response.token_ids) for response in responses) == num_tokens
    assert sum(len(response.logprobs) for response in responses) == num_tokens
    assert responses[-1].token_ids


@pytest.mark.parametrize("sampling", [{"logprobs": 20}, {"prompt_logprobs": 20}, {"stop": "s" * 400}])
def test_what_no_response_could_hold_is_refused(make_server, fails, sampling):
    server = make_server(max_message_bytes=500)
    with Client(server.target) as client:
        message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", **sampling)))
        assert message.endswith("which exceeds max_message_bytes 500")
        assert list(client.generate("abc", max_tokens=1))
    assert server.engine.num_steps < 20, "nothing was computed for them"


def test_a_single_response_over_the_limit(make_server, fails, monkeypatch):
    server = make_server(max_message_bytes=1000)
    monkeypatch.setattr(server.engine.tokenizer, "decode", lambda ids, skip_special_tokens: "word " * len(ids))
    with Client(server.target) as client:
        assert client.detokenize([2] * 100) == "word " * 100
        message = fails(StatusCode.INVALID_ARGUMENT, lambda: client.detokenize([2] * 500))
        assert message == "response of 2503 bytes exceeds max_message_bytes 1000"


def test_slow_tokenizer_neither_blocks_streams_nor_hangs(server, client, fails, monkeypatch):
    monkeypatch.setattr(text_threads, "TIMEOUT_SECONDS", 0.2)
    release = threading.Event()
    monkeypatch.setattr(server.engine.tokenizer, "apply_chat_template", lambda messages: release.wait(5) and "")
    stream = iter(client.generate("abc", max_tokens=None))
    next(stream)
    slow = client.generate(CHAT)
    started_seconds = time.monotonic()
    for _ in range(10):
        next(stream)
    assert time.monotonic() - started_seconds < 0.2
    assert "prompt must tokenize within" in fails(StatusCode.INVALID_ARGUMENT, lambda: list(slow))
    release.set()
    stream.cancel()


# ---- aborts, cancels, deadlines


def test_abort_ends_the_stream(server, client):
    stream = client.generate("abc", request_id="a", max_tokens=None)
    next(iter(stream))
    assert client.abort("a")
    assert server.engine.aborted == ["a"]
    *_, last = stream
    assert last.finish_reason == pb.FINISH_REASON_ABORT
    assert last.usage.prompt_tokens == 3
    assert last.usage.output_tokens >= 1
    assert not client.abort("a")
    assert not client.abort("never seen")


def test_cancel_frees_the_request(server, client, eventually):
    stream = client.generate("abc", request_id="a", max_tokens=None)
    next(iter(stream))
    stream.cancel()
    eventually(lambda: server.engine.aborted == ["a"])
    assert list(client.generate("abc", request_id="a", max_tokens=1))


def test_deadline_frees_the_request(server, client, fails, eventually):
    fails(
        StatusCode.DEADLINE_EXCEEDED,
        lambda: list(client.generate("abc", request_id="late", max_tokens=None, timeout_seconds=0.2)),
    )
    eventually(lambda: server.engine.aborted == ["late"])


def test_storm_of_disconnects(server, client, eventually):
    for _ in range(5):
        with Client(server.target) as other:
            streams = [other.generate("abc", max_tokens=None) for _ in range(20)]
            next(iter(streams[0]))
    eventually(lambda: not server.engine.has_unfinished() and not server.admission.num_active)
    assert len(list(client.generate("abc", max_tokens=3))) == 3


def test_idle_engine_does_not_spin(server, client):
    list(client.generate("abc", max_tokens=3))
    num_steps = server.engine.num_steps
    time.sleep(0.2)
    assert server.engine.num_steps == num_steps


def test_queue_full(make_server, eventually):
    server = make_server(max_waiting=2)
    with Client(server.target) as client:
        streams = [client.generate("abc", max_tokens=None) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(grpc.RpcError) as caught:
            list(client.generate("abc"))
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert "max_waiting" in caught.value.details()
        assert int(dict(caught.value.trailing_metadata())["retry-after-ms"]) > 0
        streams[0].cancel()
        eventually(lambda: server.admission.num_active < 2)
        assert list(client.generate("abc", max_tokens=1))


def test_every_call_of_a_flood_is_served_or_told_when_to_come_back(make_server):
    server = make_server(max_waiting=4)

    async def flood() -> Counter[StatusCode | str]:
        codes: Counter[StatusCode | str] = Counter()
        async with AsyncClient(server.target) as client, asyncio.TaskGroup() as group:

            async def call() -> None:
                try:
                    async for _ in client.generate([2] * 20, max_tokens=2):
                        pass
                    codes[StatusCode.OK] += 1
                except grpc.aio.AioRpcError as error:
                    when = "retry-after-ms" in dict(error.trailing_metadata())
                    codes[error.code() if when else "no retry-after-ms"] += 1

            for _ in range(1500):
                group.create_task(call())
        return codes

    codes = asyncio.run(flood())
    assert codes.keys() == {StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED}
    assert codes.total() == 1500
    assert health(server.target, SERVICE_NAME) == SERVING


def test_calls_beside_requests_are_limited_but_for_health(make_server, eventually, monkeypatch):
    monkeypatch.setattr(listener, "SPARE_CALLS", 1)
    server = make_server(max_waiting=1)
    release = threading.Event()
    monkeypatch.setattr(server.engine.tokenizer, "encode", lambda text, **options: release.wait(10) and [2])
    with Client(server.target) as client:
        calls = [client._stub.Tokenize.future(pb.TokenizeRequest(text="a")) for _ in range(2)]
        eventually(lambda: server.server.grpc.listener.door._num_calls == 2)
        with pytest.raises(grpc.RpcError) as caught:
            client.model_info()
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "2 calls are under way, the limit is 2"
        assert "retry-after-ms" in dict(caught.value.trailing_metadata())
        assert client.ready()
        release.set()
        assert [list(call.result(timeout=5).token_ids) for call in calls] == [[2], [2]]
        assert client.model_info()


# ---- health, reflection, connections


def test_health_follows_warm_up_and_drain(make_server, fails):
    server = make_server(ready=False)
    assert health(server.target, LIVE) == SERVING
    assert health(server.target, SERVICE_NAME) == NOT_SERVING
    with Client(server.target) as client:
        assert not client.ready()
        with pytest.raises(TimeoutError, match=re.escape(server.target)):
            client.wait_ready(timeout_seconds=0.2)
        for call in (lambda: list(client.generate("abc")), client.model_info, lambda: client.tokenize("abc")):
            assert fails(StatusCode.UNAVAILABLE, call) == "the server is warming up"
        server.set_ready()
        client.wait_ready(timeout_seconds=5)


def test_drain_lets_running_requests_finish(make_server, fails):
    server = make_server(drain_seconds=20)
    with Client(server.target) as client:
        stream = iter(client.generate("abc", max_tokens=100))
        next(stream)
        shutdown = server.submit(server.server.shutdown())
        while health(server.target, SERVICE_NAME) == SERVING:
            time.sleep(0.005)
        assert health(server.target, LIVE) == SERVING
        assert fails(StatusCode.UNAVAILABLE, lambda: list(client.generate("abc"))) == "the server is draining"
        *_, last = stream
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        shutdown.result(timeout=5)
        assert server.engine.closed
        assert not server.engine.aborted


def test_drain_aborts_what_takes_too_long(make_server):
    server = make_server(drain_seconds=0.1)
    with Client(server.target) as client:
        stream = client.generate("abc", request_id="long", max_tokens=None)
        next(iter(stream))
        server.call(server.server.shutdown())
        *_, last = stream
        assert last.finish_reason == pb.FINISH_REASON_ABORT
        assert server.engine.aborted == ["long"]


def test_drain_tells_whom_it_served_nothing(make_server, fails, eventually):
    server = make_server(drain_seconds=0.1)
    server.engine.starved = {"second"}
    with Client(server.target) as client:
        first = client.generate("abc", request_id="first", max_tokens=None)
        second = client.generate("abc", request_id="second", max_tokens=None)
        next(iter(first))
        eventually(lambda: "second" in server.engine.running)
        server.call(server.server.shutdown())
        assert fails(StatusCode.UNAVAILABLE, lambda: list(second)) == "the engine has stopped"
        *_, last = first
        assert last.finish_reason == pb.FINISH_REASON_ABORT


def test_abort_before_the_first_token_is_no_failure(server, client, eventually):
    server.engine.starved = {"a"}
    stream = client.generate("abc", request_id="a")
    eventually(lambda: "a" in server.engine.running)
    assert client.abort("a")
    (only,) = stream
    assert only.finish_reason == pb.FINISH_REASON_ABORT
    assert not only.token_ids


def test_engine_death_ends_streams_and_health(server, client, fails):
    stream = client.generate("abc", max_tokens=None)
    next(iter(stream))
    server.engine.step_error = RuntimeError("secret of the device")
    assert fails(StatusCode.UNAVAILABLE, lambda: list(stream)) == "the engine has stopped"
    assert fails(StatusCode.UNAVAILABLE, lambda: list(client.generate("abc"))) == "the engine has stopped"
    assert health(server.target, SERVICE_NAME) == NOT_SERVING
    assert health(server.target, LIVE) == NOT_SERVING


def test_reflection_describes_the_services(server):
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(database.get_services())
        described = database.FindFileContainingSymbol(SERVICE_NAME)
        assert [m.name for m in described.service[0].method][:2] == ["Generate", "Abort"]


def test_pings_of_an_idle_client_are_welcome(server):
    options = [
        ("grpc.keepalive_time_ms", 1_050),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    states = []
    with grpc.insecure_channel(server.target, options=options) as channel:
        channel.subscribe(states.append, try_to_connect=True)
        time.sleep(5)
    assert states[-1] is grpc.ChannelConnectivity.READY
    assert states.count(grpc.ChannelConnectivity.READY) == 1


def test_port_in_use():
    async def start(port: int) -> None:
        config = ServerConfig(port=port)
        await Server(config).start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port {port} is in use$"):
            asyncio.run(start(port))


def test_host_that_is_not_ours():
    async def start() -> None:
        config = ServerConfig(host="192.0.2.1", port=0)
        await Server(config).start()

    with pytest.raises(ConfigError, match=r"^cannot listen on 192\.0\.2\.1:0: "):
        asyncio.run(start())
