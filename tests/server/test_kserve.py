"""KServe's protocol over a fake engine: tensors, many requests in one stream, and what is wrong with one of them."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from jaxserve.sampling_params import SamplingParams
from jaxserve.server import listener
from jaxserve.server.kserve import KSERVE_NAME
from jaxserve.server.proto.inference import grpc_service_pb2 as pb
from jaxserve.server.proto.inference import grpc_service_pb2_grpc as pb_grpc
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.server.conftest import RunningServer

TYPES = {bytes: "BYTES", bool: "BOOL"}


def tensor(name: str, value: bytes | bool, **changes: Any) -> pb.ModelInferRequest.InferInputTensor:
    contents = {"bool_contents": [value]} if isinstance(value, bool) else {"bytes_contents": [value]}
    fields = {"name": name, "datatype": TYPES[type(value)], "shape": [1], "contents": contents, **changes}
    return pb.ModelInferRequest.InferInputTensor(**fields)


def ask(text: str = "abc", *, empty_final: bool = True, raw: bool = False, **given: Any) -> pb.ModelInferRequest:
    """A request as Triton's clients make it. Of ``given``, fields of the message stay such, inputs are bool or bytes,
    and what else there is are sampling parameters.
    """
    fields = {name: given.pop(name) for name in ("id", "model_name", "model_version") if name in given}
    values: dict[str, bytes | bool] = {"text_input": text.encode()}
    values |= {name: given.pop(name) for name in ("stream", "exclude_input_in_output") if name in given}
    values["sampling_parameters"] = json.dumps(given).encode()
    request = pb.ModelInferRequest(**fields)
    for name, value in values.items():
        request.inputs.append(tensor(name, value))
        if raw:
            request.inputs[-1].ClearField("contents")
            packed = bytes([value]) if isinstance(value, bool) else len(value).to_bytes(4, "little") + value
            request.raw_input_contents.append(packed)
    if empty_final:
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def text_of(response: pb.ModelInferResponse) -> str | None:
    """None where there is no output."""
    if not response.outputs:
        return None
    (output,), (raw,) = response.outputs, response.raw_output_contents
    assert (output.name, output.datatype, list(output.shape)) == ("text_output", "BYTES", [1])
    assert int.from_bytes(raw[:4], "little") == len(raw) - 4
    return raw[4:].decode()


class Stream:
    """One ModelStreamInfer, to send and receive in turns."""

    def __init__(self, stub: Any, metadata: Any = None) -> None:
        self._requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
        self.call = stub.ModelStreamInfer(iter(self._requests.get, None), timeout=30, metadata=metadata)

    def send(self, *requests: pb.ModelInferRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def end(self) -> list[pb.ModelStreamInferResponse]:
        """Send no more; the responses that are left."""
        self._requests.put(None)
        return list(self.call)


@pytest.fixture
def stub_of(channel_to: Callable[[RunningServer], grpc.Channel]) -> Callable[[RunningServer], Any]:
    return lambda server: pb_grpc.GRPCInferenceServiceStub(channel_to(server))


@pytest.fixture
def stub(server: RunningServer, stub_of: Callable[[RunningServer], Any]) -> Any:
    return stub_of(server)


def error_of(stub: Any, request: pb.ModelInferRequest) -> str:
    """Its only response's, in a stream that goes on."""
    stream = Stream(stub)
    stream.send(request)
    failed = next(stream.call)
    assert failed.infer_response.id == request.id[:128]
    assert failed.infer_response.parameters["triton_final_response"].bool_param
    stream.send(ask(max_tokens=1))
    assert [text_of(response.infer_response) for response in stream.end()] == ["abcx", None]
    return failed.error_message


# ---- one request


@pytest.mark.parametrize("raw", [True, False])
def test_a_stream_has_every_delta_and_an_empty_end(stub, raw):
    stream = Stream(stub)
    stream.send(ask(stream=True, raw=raw, max_tokens=3, id="mine"))
    responses = [response.infer_response for response in stream.end()]
    assert [text_of(response) for response in responses] == ["x", "x", "x", None]
    assert [r.parameters["triton_final_response"].bool_param for r in responses] == [False, False, False, True]
    assert {(r.model_name, r.model_version, r.id) for r in responses} == {("fake", "1", "mine")}


def test_without_an_empty_end_the_last_output_is_final(stub):
    stream = Stream(stub)
    stream.send(ask(empty_final=False, stream=True, max_tokens=2))
    responses = [response.infer_response for response in stream.end()]
    assert [text_of(response) for response in responses] == ["x", "x"]
    assert [r.parameters["triton_final_response"].bool_param for r in responses] == [False, True]


@pytest.mark.parametrize(
    ("inputs", "texts"),
    [
        ({}, ["abcxx"]),
        ({"exclude_input_in_output": True}, ["xx"]),
        ({"stream": True}, ["x", "x"]),
        ({"stream": True, "exclude_input_in_output": False}, ["abcx", "x"]),
    ],
)
def test_an_output_may_begin_with_its_prompt(stub, inputs, texts):
    stream = Stream(stub)
    stream.send(ask(max_tokens=2, **inputs))
    assert [text_of(response.infer_response) for response in stream.end()] == [*texts, None]


def test_one_response(stub, fails):
    response = stub.ModelInfer(ask(max_tokens=3, model_name="fake", model_version="1", id="a"))
    assert text_of(response) == "abcxxx"
    assert response.id == "a"
    assert response.parameters["triton_final_response"].bool_param
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: stub.ModelInfer(ask(stream=True)))
    assert message == "stream must be false in ModelInfer, got true: ModelStreamInfer has streams"


def test_sampling_parameters(server, stub):
    stream = Stream(stub)
    given = {"temperature": "0.5", "top_k": 9, "ignore_eos": "True", "stop": "3", "max_tokens": None, "seed": None}
    stream.send(ask(stream=True, **given))
    next(stream.call)
    (request,) = server.engine.running.values()
    assert request.params == SamplingParams(temperature=0.5, top_k=9, ignore_eos=True, stop="3", max_tokens=None)
    stream.call.cancel()


def test_structured_outputs(server, stub):
    stream = Stream(stub)
    stream.send(ask(stream=True, structured_outputs={"choice": ["a", "b"]}))
    next(stream.call)
    (request,) = server.engine.running.values()
    assert request.params.structured_outputs == StructuredOutputsParams(choice=["a", "b"])
    stream.call.cancel()


def test_the_models_defaults_and_those_of_sampling_params(server, stub):
    assert text_of(stub.ModelInfer(ask())) == "abc" + 16 * "x"
    server.engine.sampling_defaults |= {"max_tokens": 7}
    assert text_of(stub.ModelInfer(ask())) == "abc" + 7 * "x"


# ---- many in a stream


def test_requests_of_a_stream_run_at_once(server, stub):
    stream = Stream(stub)
    stream.send(*(ask(stream=True, max_tokens=number, id=str(number)) for number in range(10, 30)))
    texts: dict[str, str] = {}
    order = []
    for response in stream.end():
        order.append(response.infer_response.id)
        texts[order[-1]] = texts.get(order[-1], "") + (text_of(response.infer_response) or "")
    assert texts == {str(number): "x" * number for number in range(10, 30)}
    assert order.index("29") < len(order) - 1 - order[::-1].index("10"), "their responses mix"
    assert not server.admission.num_active


def test_an_id_need_not_be_unique(stub):
    stream = Stream(stub)
    stream.send(*[ask(stream=True, max_tokens=5, id="same")] * 2)
    assert sum(text_of(response.infer_response) == "x" for response in stream.end()) == 10


def test_an_error_leaves_the_others_alone(stub):
    stream = Stream(stub)
    stream.send(ask(stream=True, max_tokens=40, id="good"), ask(temperature=-1, id="bad"))
    responses = stream.end()
    (failed,) = [response for response in responses if response.error_message]
    assert failed.infer_response.id == "bad"
    assert failed.error_message == "temperature must be in [0, 100], got -1"
    good = [response for response in responses if response.infer_response.id == "good"]
    assert [text_of(response.infer_response) for response in good] == ["x"] * 40 + [None]


def test_cancel_frees_all_requests_of_the_stream(server, stub, eventually):
    stream = Stream(stub)
    stream.send(*[ask(stream=True, max_tokens=None)] * 3)
    eventually(lambda: len(server.engine.running) == 3)
    stream.call.cancel()
    eventually(lambda: len(server.engine.aborted) == 3 and not server.admission.num_active)
    assert text_of(stub.ModelInfer(ask(max_tokens=1))) == "abcx"


def test_storm_of_disconnects(server, eventually, caplog):
    for _ in range(5):
        with grpc.insecure_channel(server.target) as channel:
            streams = [Stream(pb_grpc.GRPCInferenceServiceStub(channel)) for _ in range(5)]
            for stream in streams:
                stream.send(*[ask(stream=True, max_tokens=None)] * 4)
            next(streams[0].call)
    eventually(lambda: not server.engine.has_unfinished() and not server.admission.num_active)
    eventually(lambda: not server.server.grpc.listener.door._num_calls)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_stream_reads_no_more_than_may_wait(make_server, stub_of, eventually):
    server = make_server(max_waiting=2)
    stream = Stream(stub_of(server))
    stream.send(*(ask(stream=True, max_tokens=20, id=str(number)) for number in range(6)))
    responses = stream.end()
    assert not any(response.error_message for response in responses)
    assert sum(text_of(response.infer_response) == "x" for response in responses) == 120


def test_queue_full(make_server, stub_of):
    server = make_server(max_waiting=1)
    stub = stub_of(server)
    first, second = Stream(stub), Stream(stub)
    first.send(ask(stream=True, max_tokens=None))
    next(first.call)
    second.send(ask(id="late"))
    assert next(second.call).error_message == "max_waiting requests are in flight, the limit is 1"
    first.call.cancel()


def test_messages_of_a_stream_are_calls(make_server, stub_of, monkeypatch, eventually):
    monkeypatch.setattr(listener, "SPARE_CALLS", 0)
    server = make_server(max_waiting=2)
    stub = stub_of(server)
    stream = Stream(stub)
    stream.send(ask(stream=True, max_tokens=None))
    next(stream.call)
    stream.send(ask(id="late"))
    failed = next(response for response in stream.call if response.error_message)
    assert (failed.error_message, failed.infer_response.id) == ("2 calls are under way, the limit is 2", "")
    stream.call.cancel()


# ---- what is wrong with a request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_name": "other"}, "model must be 'fake', which is served here, got 'other'"),
        ({"model_version": "2"}, "model_version must be '1', which is served here, got '2'"),
        ({"id": "a" * 129}, "id must have at most 128 characters, got 129"),
        ({"text": "a" * 1001}, "prompt of 1001 tokens exceeds max_model_len 1000"),
        ({"text": ""}, "prompt must hold at least one token, got none"),
        ({"text": "break"}, "internal error"),
        ({"max_tokens": 0}, "max_tokens must be an integer in [1, 2147483647], got 0"),
        ({"temperature": "hot"}, "temperature must be in [0, 100], got 'hot'"),
        ({"stop": [""]}, "stop must be at most 16 non-empty strings, got ('',)"),
        ({"beams": 1}, "unknown sampling parameter 'beams'; known: allowed_token_ids, "),
        ({"logprobs": 1}, "unknown sampling parameter 'logprobs'; known: "),
    ],
)
def test_bad_requests(stub, fields, message):
    assert message in error_of(stub, ask(**fields))


def test_what_is_too_long_to_be_read_fails_alone(stub):
    message = error_of(stub, ask("a" * 1_100_000))
    assert message.endswith(" bytes exceeds 1048576 bytes, more than a prompt of max_model_len tokens takes")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "image"}, "unknown input 'image'; known: text_input, stream, sampling_parameters, exclude_"),
        ({"name": "text_input"}, "input text_input must be given once, got it again"),
        ({"datatype": "FP32"}, "input sampling_parameters must be of datatype BYTES, got 'FP32'"),
        ({"shape": [1, 1]}, "input sampling_parameters must have shape [1], got [1, 1]"),
        ({"contents": {}}, "input sampling_parameters must hold one element, got 0"),
        ({"contents": {"bytes_contents": [b"", b""]}}, "input sampling_parameters must hold one element, got 2"),
        ({"contents": {"bytes_contents": [b"\xff"]}}, "input sampling_parameters must be UTF-8, got b'\\xff'"),
        ({"contents": {"bytes_contents": [b"[]"]}}, "sampling_parameters must be a JSON object, got '[]'"),
        ({"contents": {"bytes_contents": [b"{"]}}, "sampling_parameters must be a JSON object, got '{'"),
        (
            {"parameters": {"shared_memory_region": pb.InferParameter(string_param="a")}},
            "sampling_parameters must have no parameters, got 'shared_memory_region'",
        ),
    ],
)
def test_bad_inputs(stub, changed, message):
    inputs = [tensor("text_input", b"abc"), tensor(**{"name": "sampling_parameters", "value": b"{}", **changed})]
    assert message in error_of(stub, pb.ModelInferRequest(inputs=inputs))


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("text_input", b"\3\0\0\0ab", "input text_input must be 4 bytes of length and one text, got b'\\x03\\x00"),
        ("text_input", b"ab", "input text_input must be 4 bytes of length and one text, got b'ab'"),
        ("stream", b"\2", "input stream must be one byte, 0 or 1, got b'\\x02'"),
        ("stream", b"", "input stream must be one byte, 0 or 1, got b''"),
    ],
)
def test_bad_raw_inputs(stub, name, raw, message):
    request = ask(raw=True, stream=True)
    request.raw_input_contents[[given.name for given in request.inputs].index(name)] = raw
    assert message in error_of(stub, request)


def test_raw_inputs_that_are_missing(stub):
    request = ask(raw=True)
    del request.raw_input_contents[1:]
    assert error_of(stub, request) == "raw_input_contents must have one entry for each of 2, got 1"


def test_what_is_not_served_is_refused_by_name(stub):
    assert error_of(stub, pb.ModelInferRequest()) == "input text_input must be given, got none"
    request = ask()
    request.outputs.add(name="logprobs")
    assert error_of(stub, request) == "unknown output 'logprobs'; known: text_output"
    request = ask()
    request.outputs.add(name="text_output").parameters["classification"].int64_param = 1
    assert error_of(stub, request) == "text_output must have no parameters, got 'classification'"
    request = ask()
    request.parameters["priority"].uint64_param = 1
    assert error_of(stub, request) == (
        "unknown parameter 'priority'; sampling parameters go into the input sampling_parameters"
    )
    request = ask(max_tokens=1)
    request.outputs.add(name="text_output")
    assert text_of(stub.ModelInfer(request)) == "abcx"


def test_a_message_that_is_none_fails_alone(server, stub):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream(
            f"/{KSERVE_NAME}/ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString
        )
        responses = list(call(iter([b"\xff\xff", ask(max_tokens=1).SerializeToString()]), timeout=30))
    errors = [response.error_message for response in responses if response.error_message]
    assert errors == ["the request is no message of this method"]
    assert "abcx" in [text_of(response.infer_response) for response in responses]


def test_an_output_over_the_limit(make_server, stub_of, fails):
    server = make_server(max_message_bytes=500)
    stub = stub_of(server)
    message = "bytes exceeds max_message_bytes 500"
    assert message in error_of(stub, ask("a" * 300, max_tokens=150))
    assert message in fails(StatusCode.INVALID_ARGUMENT, lambda: stub.ModelInfer(ask("a" * 300, max_tokens=150)))


# ---- server and model


def test_metadata_and_configuration(stub, fails):
    server = stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == ("jaxserve", ["model_configuration"])
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="fake"))
    assert (metadata.name, list(metadata.versions)) == ("fake", ["1"])
    assert {given.name: given.datatype for given in metadata.inputs} == {
        "text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES", "exclude_input_in_output": "BOOL",
    }  # fmt: skip
    config = stub.ModelConfig(pb.ModelConfigRequest(name="fake", version="1")).config
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 0
    assert [given.name for given in config.input if not given.optional] == ["text_input"]
    assert [(output.name, output.data_type) for output in config.output] == [("text_output", pb.TYPE_STRING)]
    for call in (
        lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name="other")),
        lambda: stub.ModelConfig(pb.ModelConfigRequest(version="2")),
        lambda: stub.ModelInfer(ask(model_name="other")),
    ):
        assert "which is served here" in fails(StatusCode.NOT_FOUND, call)


def test_the_first_of_the_served_names_is_in_responses(make_server, stub_of):
    stub = stub_of(make_server(served_model_name="one,two"))
    assert stub.ModelInfer(ask(model_name="two", max_tokens=1)).model_name == "one"
    ready = {name: stub.ModelReady(pb.ModelReadyRequest(name=name)).ready for name in ("one", "two", "fake")}
    assert ready == {"one": True, "two": True, "fake": False}


def test_ready_follows_warm_up_drain_and_failure(make_server, stub_of, fails, eventually):
    server = make_server(ready=False, drain_seconds=20)
    stub = stub_of(server)

    def states() -> tuple[bool, bool, bool]:
        live = stub.ServerLive(pb.ServerLiveRequest()).live
        ready = stub.ServerReady(pb.ServerReadyRequest()).ready
        return live, ready, stub.ModelReady(pb.ModelReadyRequest(name="fake")).ready

    assert states() == (True, False, False)
    assert fails(StatusCode.UNAVAILABLE, lambda: stub.ModelInfer(ask())) == "the server is warming up"
    server.set_ready()
    assert states() == (True, True, True)
    stream = Stream(stub)
    stream.send(ask(stream=True, max_tokens=100))
    next(stream.call)
    shutdown = server.submit(server.server.shutdown())
    eventually(lambda: states() == (True, False, False))
    stream.send(ask(id="late"))
    responses = stream.end()
    (failed,) = [response for response in responses if response.error_message]
    assert (failed.error_message, failed.infer_response.id) == ("the server is draining", "late")
    assert text_of(responses[-1].infer_response) is None
    assert responses[-1].infer_response.id == "", "what was under way came to its end"
    shutdown.result(timeout=5)


def test_drain_aborts_what_takes_too_long_and_idle_streams(make_server, stub_of, fails):
    server = make_server(drain_seconds=0.1)
    stub = stub_of(server)
    idle, stream = Stream(stub), Stream(stub)
    stream.send(ask(stream=True, max_tokens=None))
    next(stream.call)
    server.call(server.server.shutdown())
    assert next(r for r in stream.call if r.error_message).error_message == "the request was aborted"
    fails(StatusCode.UNAVAILABLE, lambda: list(idle.call))


def test_engine_death(server, stub, fails):
    stream = Stream(stub)
    stream.send(ask(stream=True, max_tokens=None))
    next(stream.call)
    server.engine.step_error = RuntimeError("secret of the device")
    assert next(r for r in stream.call if r.error_message).error_message == "the engine has stopped"
    assert fails(StatusCode.UNAVAILABLE, lambda: stub.ModelInfer(ask())) == "the engine has stopped"
    assert not stub.ServerLive(pb.ServerLiveRequest()).live
    stream.end()


def test_a_key(make_server, stub_of, fails, tmp_path):
    file = tmp_path / "keys"
    file.write_text("secret\n")
    stub = stub_of(make_server(api_key_file=str(file)))
    metadata = (("authorization", "Bearer secret"),)
    stream = Stream(stub, metadata)
    stream.send(ask(max_tokens=1))
    assert text_of(stream.end()[0].infer_response) == "abcx"
    fails(StatusCode.UNAUTHENTICATED, lambda: Stream(stub).end())
    fails(StatusCode.UNAUTHENTICATED, lambda: stub.ModelInfer(ask()))


def test_health_and_reflection(server):
    with grpc.insecure_channel(server.target) as channel:
        request = health_pb2.HealthCheckRequest(service=KSERVE_NAME)
        assert health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert KSERVE_NAME in database.get_services()
        described = database.FindFileContainingSymbol(KSERVE_NAME)
        assert "ModelStreamInfer" in [method.name for method in described.service[0].method]
