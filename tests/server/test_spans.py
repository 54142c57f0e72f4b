"""A span for every request, as a collector gets it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from jaxserve.errors import ConfigError
from jaxserve.server.client import Client
from jaxserve.server.config import ServerConfig
from jaxserve.server.proto.jaxserve.v1 import inference_pb2, inference_pb2_grpc
from jaxserve.server.spans import Spans
from tests.hosts.test_several_hosts import free_ports
from tests.server.conftest import RunningServer
from tests.server.test_http import error_of, send

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


class Collector(pb_grpc.TraceServiceServicer):
    """An OTLP receiver."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Span] = []
        self.service_names: set[str] = set()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        for group in request.resource_spans:
            self.service_names |= {
                item.value.string_value for item in group.resource.attributes if item.key == "service.name"
            }
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    receiving = grpc.server(ThreadPoolExecutor(1))
    collector = Collector()
    pb_grpc.add_TraceServiceServicer_to_server(collector, receiving)
    collector.endpoint = f"http://127.0.0.1:{receiving.add_insecure_port('127.0.0.1:0')}"
    receiving.start()
    yield collector
    receiving.stop(None).wait()


@pytest.fixture
def server(collector: Collector, make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(http_port=0, otlp_traces_endpoint=collector.endpoint)


@pytest.fixture
def spans(collector: Collector, eventually: Callable[..., None]) -> Callable[[int], list[dict[str, Any]]]:
    """Waits for that many; each as its attributes, and itself under ``span``."""

    def spans(number: int) -> list[dict[str, Any]]:
        eventually(lambda: len(collector.spans) >= number)
        assert len(collector.spans) == number
        return [{**attributes(span), "span": span} for span in collector.spans]

    return spans


def attributes(span: Span) -> dict[str, Any]:
    found = {}
    for item in span.attributes:
        value = getattr(item.value, item.value.WhichOneof("value"))
        found[item.key] = [v.string_value for v in value.values] if hasattr(value, "values") else value
    return found


def test_a_request_over_http_has_a_span_below_its_callers(server: RunningServer, spans: Any, collector: Any) -> None:
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9}
    status, _, answer = send(server, "POST", "/v1/completions", body, {"traceparent": TRACEPARENT})
    assert status == 200
    (found,) = spans(1)
    span = found.pop("span")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert (span.name, span.kind) == ("text_completion fake", Span.SPAN_KIND_SERVER)
    assert collector.service_names == {"jaxserve"}
    assert span.start_time_unix_nano < span.end_time_unix_nano
    seconds = {name: found.pop(name) for name in sorted(found) if "latency" in name or "time_to" in name}
    assert found.pop("gen_ai.response.id").startswith(answer["id"])
    assert found == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert set(seconds) == {
        "gen_ai.latency.e2e", "gen_ai.latency.time_in_model_decode", "gen_ai.latency.time_in_model_inference",
        "gen_ai.latency.time_in_model_prefill", "gen_ai.latency.time_in_queue", "gen_ai.server.time_to_first_token",
    }  # fmt: skip
    phases = [seconds[f"gen_ai.latency.time_in_{phase}"] for phase in ("queue", "model_prefill", "model_decode")]
    assert sum(phases) == pytest.approx(seconds["gen_ai.latency.e2e"])


def test_a_call_over_grpc_and_each_choice_have_one(server: RunningServer, spans: Any, channel_to: Any) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel_to(server))
    request = inference_pb2.GenerateRequest(text="ab", request_id="mine")
    request.sampling_params.max_tokens = 1
    list(stub.Generate(request, metadata=[("traceparent", TRACEPARENT)]))
    (found,) = spans(1)
    assert found["gen_ai.response.id"] == "mine"
    assert (found["span"].trace_id.hex(), found["span"].parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    body = {"prompt": "abc", "max_tokens": 1, "n": 3}
    send(server, "POST", "/v1/completions", body, {"traceparent": TRACEPARENT})
    assert {found["span"].trace_id.hex() for found in spans(4)} == {TRACE_ID}
    send(server, "POST", "/v1/completions", body)
    traces = {found["span"].trace_id.hex() for found in spans(7)}
    assert len(traces) == 4
    assert all(not found["span"].parent_span_id for found in spans(7)[4:])


def test_errors_and_aborts_end_spans(server: RunningServer, spans: Any, eventually: Any) -> None:
    with Client(server.target) as client:
        stream = client.generate("abc", max_tokens=None)
        next(iter(stream))
        stream.cancel()
    (aborted,) = spans(1)
    assert aborted["gen_ai.response.finish_reasons"] == ["abort"]
    error_of(send(server, "POST", "/v1/completions", {"prompt": "", "max_tokens": 1}), 400)
    _, failed = spans(2)
    assert failed["error.type"] == "RequestError"
    assert failed["span"].status.code == Status.STATUS_CODE_ERROR
    assert failed["span"].status.message == "prompt must hold at least one token, got none"
    assert "gen_ai.response.finish_reasons" not in failed


def test_a_collector_that_is_not_there_holds_up_nothing(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, otlp_traces_endpoint=f"http://127.0.0.1:{free_ports()}")
    for _ in range(3):
        assert send(server, "POST", "/v1/completions", {"prompt": "abc", "max_tokens": 2})[0] == 200


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint needs the packages of the extra 'otel'"):
        Spans("http://localhost:4317")


@pytest.mark.parametrize("endpoint", ["localhost:4317", "ftp://there", "http://"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be a URL such as http://localhost:4317, got"):
        ServerConfig(otlp_traces_endpoint=endpoint)
