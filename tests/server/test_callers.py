"""The limit of one key's requests, which every protocol counts together."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.server.caller import Caller
from jaxserve.server.client import Client
from jaxserve.server.proto.inference import grpc_service_pb2_grpc as kserve_grpc
from jaxserve.server.proto.vllm import vllm_engine_pb2_grpc as vllm_grpc
from tests.server import test_kserve, test_vllm_grpc
from tests.server.conftest import RunningServer

MESSAGE = "max_waiting_per_key requests of this API key are in flight, the limit is 2"
Say = Callable[[RunningServer, str, int], str | None]
"""Asks by one protocol, with a key, for this many sequences; gives the error's message."""


def say_jaxserve(server: RunningServer, key: str, n: int) -> str | None:
    with Client(server.target, api_key=key) as client:
        calls = [client.generate("abc", max_tokens=1 if n == 1 else 100) for _ in range(n)]
        try:
            for call in calls:
                list(call)
        except grpc.RpcError as error:
            return error.details() if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else str(error)
    return None


def say_kserve(server: RunningServer, key: str, n: int) -> str | None:
    with grpc.insecure_channel(server.target) as channel:
        stub = kserve_grpc.GRPCInferenceServiceStub(channel)
        stream = test_kserve.Stream(stub, metadata=(("authorization", f"Bearer {key}"),))
        stream.send(*(test_kserve.ask(max_tokens=1 if n == 1 else 100) for _ in range(n)))
        return next((response.error_message for response in stream.end() if response.error_message), None)


def say_vllm(server: RunningServer, key: str, n: int) -> str | None:
    with grpc.insecure_channel(server.target) as channel:
        stub = vllm_grpc.VllmEngineStub(channel)
        request = test_vllm_grpc.ask(max_tokens=1, n=n)
        try:
            list(stub.Generate(request, metadata=(("authorization", f"Bearer {key}"),)))
        except grpc.RpcError as error:
            return error.details() if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else str(error)
    return None


def say_openai(server: RunningServer, key: str, n: int) -> str | None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, "n": n}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Authorization": f"Bearer {key}"})
    try:
        urllib.request.urlopen(request, timeout=20).close()
    except urllib.error.HTTPError as error:
        return json.loads(error.read())["error"]["message"] if error.code == 429 else str(error)
    return None


@pytest.mark.parametrize("say", [say_jaxserve, say_kserve, say_vllm, say_openai])
def test_one_key_does_not_fill_the_queue(
    make_server: Callable[..., RunningServer], eventually: Callable[..., None], tmp_path: Path, say: Say
) -> None:
    file = tmp_path / "keys"
    file.write_text("greedy\nmodest\n")
    server = make_server(http_port=0, api_key_file=str(file), max_waiting_per_key=2)
    assert say(server, "greedy", 3) == MESSAGE
    assert say(server, "greedy", 1) is None
    eventually(lambda: not server.admission.num_active)
    with Client(server.target, api_key="greedy") as client:
        streams = [client.generate("abc", max_tokens=None) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        assert say(server, "greedy", 1) == MESSAGE
        assert say(server, "modest", 1) is None
        streams[0].cancel()
        eventually(lambda: server.admission.num_active == 1)
        assert say(server, "greedy", 1) is None
        streams[1].cancel()
    eventually(lambda: not server.admission._num_active_of)


def test_engines_know_whose_a_request_is(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    """By the caller's name, so that schedulers can be fair; those without keys have none."""
    file = tmp_path / "keys"
    file.write_text("secret\n")
    for settings, expected in (({"api_key_file": str(file)}, Caller.of(b"secret").name), ({}, "")):
        server = make_server(http_port=0, **settings)
        clients, add = [], server.engine.add_request

        def spy(*args: Any, clients: list[str] = clients, add: Any = add) -> None:
            clients.append(args[5])
            add(*args)

        server.engine.add_request = spy  # type: ignore[method-assign]
        assert say_openai(server, "secret", 2) is None
        assert clients == [expected] * 2


def test_the_log_names_the_caller_and_not_the_key(
    make_server: Callable[..., RunningServer],
    eventually: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    server = make_server(http_port=0, api_key_file=str(file))
    with caplog.at_level("INFO", logger="jaxserve.server.calls"):
        assert say_openai(server, "secret", 1) is None
        eventually(lambda: f" {Caller.of(b'secret').name} POST '/v1/completions': 200 in" in caplog.text)
    assert "secret" not in caplog.text


def test_without_keys_nobody_has_a_limit_of_its_own(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, max_waiting_per_key=2)
    assert say_openai(server, "anything", 3) is None
