"""What the log and the counter tell of calls, by either door."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

from jaxserve.errors import ConfigError
from jaxserve.hosts.ranks import log_handler
from jaxserve.server.client import Client
from jaxserve.server.config import ServerConfig
from jaxserve.server.proto.jaxserve.v1 import inference_pb2, inference_pb2_grpc
from tests.server.conftest import RunningServer
from tests.server.test_http import send

GENERATE = "/jaxserve.v1.InferenceService/Generate"


@pytest.fixture
def server(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(http_port=0)


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Everything logged so far, as --log-format json writes it."""
    handler, text, root = log_handler("json"), io.StringIO(), logging.getLogger("jaxserve")
    handler.setStream(text)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in text.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(logging.NOTSET)


def test_http_requests_are_objects_with_fields(server: RunningServer, log: Any, eventually: Any) -> None:
    send(server, "POST", "/v1/completions", {"prompt": "abc", "max_tokens": 2}, {"X-Request-Id": "mine-7"})
    send(server, "GET", "/health")
    send(server, "GET", "/nothing")
    eventually(lambda: len(log()) == 2)
    first, second = log()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first.pop("time"))).total_seconds()) < 3600
    seconds = first.pop("seconds")
    assert seconds > 0
    assert first == {
        "level": "INFO", "logger": "jaxserve.server.calls",
        "message": f"mine-7 - POST '/v1/completions': 200 in {seconds:.3f} s",
        "request_id": "mine-7", "caller": "-", "method": "POST", "path": "/v1/completions", "status": "200",
    }  # fmt: skip
    assert (second["path"], second["status"]) == ("/nothing", "404")


def test_grpc_calls_have_the_same_fields(server: RunningServer, log: Any, eventually: Any, channel_to: Any) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel_to(server))
    request = inference_pb2.GenerateRequest(text="ab")
    request.sampling_params.max_tokens = 1
    list(stub.Generate(request, metadata=[("x-request-id", "mine-8")]))
    with pytest.raises(grpc.RpcError):
        list(stub.Generate(inference_pb2.GenerateRequest(text="ab", model="other")))
    with Client(server.target) as client:
        stream = client.generate("abc", max_tokens=None)
        next(iter(stream))
        stream.cancel()
    eventually(lambda: len(log()) == 3)
    lines = log()
    assert [line["status"] for line in lines] == ["OK", "NOT_FOUND", "CANCELLED"]
    assert {(line["method"], line["path"]) for line in lines} == {("gRPC", GENERATE)}
    assert lines[0]["request_id"] == "mine-8"
    assert all(len(line["request_id"]) == 32 and line["seconds"] > 0 for line in lines[1:])


def test_callers_without_a_key_are_told_of(
    make_server: Callable[..., RunningServer], log: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEYS", "secret")
    server = make_server(http_port=0)
    with Client(server.target, api_key="") as client, pytest.raises(grpc.RpcError):
        client.tokenize("abc")
    assert send(server, "POST", "/tokenize", {"prompt": "abc"})[0] == 401
    eventually(lambda: {line["status"] for line in log()} >= {"UNAUTHENTICATED", "401"})


def test_calls_are_counted(server: RunningServer) -> None:
    send(server, "GET", "/nothing")
    with Client(server.target) as client:
        client.tokenize("abc")
    text = send(server, "GET", "/metrics")[2].decode()
    for sample in (
        'jaxserve_calls_total{protocol="http",status="404"} 1.0',
        'jaxserve_calls_total{protocol="grpc",status="OK"} 1.0',
        "jaxserve_ready 1.0",
        "jaxserve_requests_in_flight 0.0",
        "jaxserve_max_waiting 1024.0",
    ):
        assert f"\n{sample}\n" in text


def test_text_stays_text() -> None:
    handler, text = log_handler("text"), io.StringIO()
    handler.setStream(text)
    handler.handle(logging.LogRecord("jaxserve.x", logging.INFO, "", 0, "said %d", (3,), None))
    assert text.getvalue().endswith(" INFO jaxserve.x: said 3\n")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="log_format must be one of text, json, got 'xml'"):
        ServerConfig(log_format="xml")
