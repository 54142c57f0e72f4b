"""vLLM's engine protocol over a fake engine: token ids in and out, and what gateways ask of a server."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import tokenizers
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from jaxserve.sampling_params import SamplingParams
from jaxserve.server.client import Client
from jaxserve.server.proto.vllm import vllm_engine_pb2 as pb
from jaxserve.server.proto.vllm import vllm_engine_pb2_grpc as pb_grpc
from jaxserve.server.vllm_grpc import VLLM_NAME
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer
from tests.server.conftest import RunningServer


def ask(ids: tuple[int, ...] = (97, 98, 99), *, request_id: str = "", stream: bool = True, **sampling: Any) -> Any:
    tokenized = pb.TokenizedInput(original_text="abc", input_ids=ids)
    params = pb.SamplingParams(**sampling)
    return pb.GenerateRequest(request_id=request_id, tokenized=tokenized, sampling_params=params, stream=stream)


@pytest.fixture
def stub_of(channel_to: Callable[[RunningServer], grpc.Channel]) -> Callable[[RunningServer], Any]:
    return lambda server: pb_grpc.VllmEngineStub(channel_to(server))


@pytest.fixture
def stub(server: RunningServer, stub_of: Callable[[RunningServer], Any]) -> Any:
    return stub_of(server)


# ---- generation


def test_a_stream_has_chunks_and_an_end(stub):
    *chunks, last = stub.Generate(ask(max_tokens=3))
    assert [list(response.chunk.token_ids) for response in chunks] == [[120]] * 3
    assert {(r.chunk.prompt_tokens, r.chunk.completion_tokens, r.chunk.index) for r in chunks} == {(3, 1, 0)}
    assert (last.complete.finish_reason, last.complete.prompt_tokens) == ("length", 3)
    assert list(last.complete.output_ids) == [120]
    assert last.complete.WhichOneof("matched_stop") is None


def test_without_a_stream_there_is_the_end_alone(stub):
    (only,) = stub.Generate(ask(stream=False, max_tokens=3, logprobs=1, prompt_logprobs=2))
    complete = only.complete
    assert list(complete.output_ids) == [120] * 3
    assert (complete.prompt_tokens, complete.completion_tokens) == (3, 3)
    assert list(complete.output_logprobs.token_logprobs) == [-0.5] * 3
    assert [list(top.token_ids) for top in complete.output_logprobs.top_logprobs] == [[120]] * 3
    assert [p.value if p.HasField("value") else None for p in complete.input_logprobs.token_logprobs] == [
        None, -0.5, -0.5,
    ]  # fmt: skip
    assert list(complete.input_logprobs.token_ids) == [97, 98, 99]
    assert [list(top.values) for top in complete.input_logprobs.top_logprobs] == [[], [-0.5, -1.5], [-0.5, -1.5]]


def test_logprobs_of_a_stream(stub):
    first, second, _ = stub.Generate(ask(max_tokens=2, logprobs=0, prompt_logprobs=0))
    assert len(first.chunk.input_logprobs.token_ids) == 3
    assert not second.chunk.HasField("input_logprobs")
    assert list(second.chunk.output_logprobs.token_ids) == [120]
    assert not second.chunk.output_logprobs.top_logprobs


def test_text_is_tokenized(stub):
    *_, last = stub.Generate(pb.GenerateRequest(text="abcd", sampling_params=pb.SamplingParams(max_tokens=1)))
    assert last.complete.prompt_tokens == 4


def test_stop_strings_end_an_output(stub):
    (only,) = stub.Generate(ask(stream=False, stop=["x"]))
    assert (only.complete.finish_reason, only.complete.matched_stop_str) == ("stop", "x")


def test_what_is_left_out_has_vllms_defaults(server, stub):
    server.engine.sampling_defaults |= {"temperature": 0.5, "top_k": 9, "max_tokens": 7}
    call = stub.Generate(ask(request_id="a"))
    next(call)
    assert server.engine.running["a"].params == SamplingParams(max_tokens=None, skip_special_tokens=False)
    call.cancel()
    given = {"temperature": 0.25, "top_p": 0.5, "top_k": 3, "seed": 7, "ignore_eos": True, "stop_token_ids": [5]}
    neutral = {"repetition_penalty": 1.0, "n": 1, "spaces_between_special_tokens": True}
    call = stub.Generate(ask(request_id="b", max_tokens=900, skip_special_tokens=True, **given, **neutral))
    next(call)
    assert server.engine.running["b"].params == SamplingParams(max_tokens=900, **given | {"stop_token_ids": (5,)})
    call.cancel()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"json_schema": '{"type": "null"}'}, {"json": '{"type": "null"}'}),
        ({"regex": "a"}, {"regex": "a"}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"json_object": True}, {"json_object": True}),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, {"choice": ("a", "b")}),
    ],
)
def test_constraints(server, stub, field, expected):
    call = stub.Generate(ask(request_id="a", **field))
    next(call)
    assert server.engine.running["a"].params.structured_outputs == StructuredOutputsParams(**expected)
    call.cancel()


@pytest.mark.parametrize("stream", [True, False])
def test_several_sequences(server, stub, stream):
    responses = list(stub.Generate(ask(request_id="a", stream=stream, max_tokens=3, n=4)))
    ends = [response.complete for response in responses if response.HasField("complete")]
    assert sorted(end.index for end in ends) == [0, 1, 2, 3]
    chunks = [response.chunk.index for response in responses if response.HasField("chunk")]
    assert sorted(chunks) == (sorted([0, 1, 2, 3] * 3) if stream else [])
    assert not server.admission.num_active


def test_several_sequences_differ_and_count(make_server, stub_of, fails):
    server = make_server(max_waiting=3)
    stub = stub_of(server)
    call = stub.Generate(ask(request_id="a", seed=5, n=3))
    next(call)
    assert sorted(request.params.seed for request in server.engine.running.values()) == [5, 6, 7]
    assert "max_waiting" in fails(StatusCode.RESOURCE_EXHAUSTED, lambda: list(stub.Generate(ask())))
    call.cancel()


def test_abort_ends_all_sequences(server, stub, eventually):
    calls = [stub.Generate(ask(request_id="one")), stub.Generate(ask(request_id="two", stream=False, n=2))]
    next(calls[0])
    eventually(lambda: len(server.engine.running) == 3)
    stub.Abort(pb.AbortRequest(request_ids=["one", "two", "never seen"]))
    ends = [response.complete for call in calls for response in call if response.HasField("complete")]
    assert [end.finish_reason for end in ends] == ["abort"] * 3
    assert sorted(server.engine.aborted) == ["one", "two-0", "two-1"]


def test_cancel_frees_the_request(server, stub, eventually):
    call = stub.Generate(ask(request_id="a", n=2))
    next(call)
    call.cancel()
    eventually(lambda: len(server.engine.aborted) == 2 and not server.admission.num_active)
    assert len(list(stub.Generate(ask(request_id="a", max_tokens=1)))) == 2


# ---- bad requests


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty must be in [-2, 2], got 2.5"),
        ({"logit_bias": {5: 101.0}}, "logit_bias must be in [-100, 100], got 101.0"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be an integer in [-1, 2147483647], got -2"),
        ({"json_schema": '{"not": {}}'}, "structured_outputs.json at # has 'not', a keyword that cannot be served"),
        ({"structural_tag": "a"}, "structured_outputs.structural_tag must be JSON, got 'a'"),
        ({"choice": pb.ChoiceConstraint()}, "structured_outputs.choice must be a list of 1 to 1024 strings, got list"),
        ({"json_object": False}, "structured_outputs must have exactly one of json, regex, choice, grammar, json_obj"),
        ({"grammar_from_first_token": True}, "grammar_from_first_token cannot be served and must be left out"),
        ({"n": 129}, "n must be an integer in [1, 128], got 129"),
        ({"temperature": -1}, "temperature must be in [0, 100], got -1.0"),
        ({"logprobs": -2}, "logprobs must be an integer in [-1, 2147483647], got -2"),
        ({"max_tokens": 0}, "max_tokens must be an integer in [1, 2147483647], got 0"),
        ({"stop": ["a"] * 17}, "stop must be at most 16 values, got 17"),
        ({"ids": (2,) * 1001}, "tokenized of 1001 input_ids exceeds max_model_len 1000"),
        ({"ids": ()}, "prompt must hold at least one token, got none"),
        ({"request_id": "a" * 129}, "request_id must have at most 128 characters, got 129"),
    ],
)
def test_bad_requests(stub, fails, sampling, message):
    assert message in fails(StatusCode.INVALID_ARGUMENT, lambda: list(stub.Generate(ask(**sampling))))
    assert len(list(stub.Generate(ask(max_tokens=1)))) == 2


@pytest.mark.parametrize(
    "field",
    [
        {"kv_transfer_params": pb.KvTransferParams()},
        {"mm_inputs": pb.MultimodalInputs()},
        {"extra_mm_inputs": [pb.MultimodalInputs()]},
        {"kv_transfer_params_json": "{}"},
        {"data_parallel_rank": 0},
        {"media_refs": pb.MediaRefs()},
    ],
)
def test_what_cannot_be_served_is_refused_by_name(stub, fails, field):
    request = ask(max_tokens=1)
    request.MergeFrom(pb.GenerateRequest(**field))
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(stub.Generate(request)))
    assert message.startswith(f"{next(iter(field))} cannot be served and must be left out, got ")


def test_input_left_out(stub, fails):
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(stub.Generate(pb.GenerateRequest())))
    assert message == "input must be given, got none"


def test_request_ids_are_unique(stub, fails):
    call = stub.Generate(ask(request_id="same", n=2))
    next(call)
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(stub.Generate(ask(request_id="same"))))
    assert message == "request_id must be unique among the requests in flight, got 'same' again"
    call.cancel()


def test_a_response_over_the_limit(make_server, stub_of, fails):
    stub = stub_of(make_server(max_message_bytes=500))
    request = ask((97,) * 100, stream=False, max_tokens=1, prompt_logprobs=20)
    message = fails(StatusCode.INVALID_ARGUMENT, lambda: list(stub.Generate(request)))
    assert message.endswith("bytes exceeds max_message_bytes 500")
    assert len(list(stub.Generate(ask(max_tokens=1)))) == 2


def test_what_is_not_served_at_all(server, fails):
    with grpc.insecure_channel(server.target) as channel:
        for method in ("Embed", "FlushCache", "GetLoads", "SubscribeKvEvents"):
            fails(StatusCode.UNIMPLEMENTED, lambda method=method: channel.unary_unary(f"/{VLLM_NAME}/{method}")(b""))


# ---- what gateways ask


def test_model_and_server(server, stub):
    server.engine.sampling_defaults |= {"temperature": 0.5, "max_tokens": 7}
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model_path, info.served_model_name, list(info.architectures)) == ("fake", "fake", ["Fake"])
    assert (info.is_generation, info.max_context_length, info.max_req_input_len) == (True, 1000, 1000)
    assert (info.vocab_size, list(info.eos_token_ids)) == (160, [0])
    assert json.loads(info.default_sampling_params_json) == {"temperature": 0.5}
    call = stub.Generate(ask())
    next(call)
    state = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (state.active_requests, state.server_type, state.data_parallel_size) == (1, "vllm-grpc", 1)
    assert (state.block_size, state.model_dtype, state.max_num_seqs) == (16, "float32", 16)
    assert state.uptime_seconds > 0
    call.cancel()


def test_a_model_without_defaults_and_replicas(make_server, stub_of):
    stub = stub_of(make_server(num_engines=2, served_model_name="one,two"))
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.served_model_name, info.default_sampling_params_json) == ("one", "")
    assert stub.GetServerInfo(pb.GetServerInfoRequest()).max_num_seqs == 32


def test_the_tokenizer_comes_as_an_archive(server, stub, monkeypatch):
    original = Tokenizer.of_bytes()
    monkeypatch.setattr(server.engine.tokenizer, "save", original.save, raising=False)
    for _ in range(2):
        chunks = list(stub.GetTokenizer(pb.GetTokenizerRequest()))
        data = b"".join(chunk.data for chunk in chunks)
        assert not any(chunk.sha256 for chunk in chunks[:-1])
        assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert "tokenizer_config.json" in archive.namelist()
        loaded = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
    assert loaded.encode("h\u00e9").ids == original.encode("h\u00e9")


def test_a_large_archive_comes_in_pieces(server, stub, monkeypatch):
    noise = b"".join(hashlib.sha256(bytes([i % 256, i // 256])).digest() for i in range(5000))
    monkeypatch.setattr(
        server.engine.tokenizer, "save", lambda folder: (folder / "tokenizer.json").write_bytes(noise), raising=False
    )
    chunks = list(stub.GetTokenizer(pb.GetTokenizerRequest()))
    assert [len(chunk.data) for chunk in chunks[:-1]] == [64 * 1024] * 2
    with zipfile.ZipFile(io.BytesIO(b"".join(chunk.data for chunk in chunks))) as archive:
        assert archive.read("tokenizer.json") == noise


# ---- admission, keys, drain


def test_health_follows_warm_up_drain_and_failure(make_server, stub_of, fails, eventually):
    server = make_server(ready=False, drain_seconds=20)
    stub = stub_of(server)

    def healthy() -> bool:
        return stub.HealthCheck(pb.HealthCheckRequest()).healthy

    assert not healthy()
    for call in (lambda: list(stub.Generate(ask())), lambda: stub.GetModelInfo(pb.GetModelInfoRequest())):
        assert fails(StatusCode.UNAVAILABLE, call) == "the server is warming up"
    server.set_ready()
    assert healthy()
    call = stub.Generate(ask(max_tokens=100))
    next(call)
    shutdown = server.submit(server.server.shutdown())
    eventually(lambda: not healthy())
    assert fails(StatusCode.UNAVAILABLE, lambda: list(stub.Generate(ask()))) == "the server is draining"
    *_, last = call
    assert last.complete.finish_reason == "length"
    shutdown.result(timeout=5)


def test_drain_aborts_what_takes_too_long(make_server, stub_of):
    server = make_server(drain_seconds=0.1)
    call = stub_of(server).Generate(ask())
    next(call)
    server.call(server.server.shutdown())
    *_, last = call
    assert last.complete.finish_reason == "abort"


def test_engine_death(server, stub, fails):
    call = stub.Generate(ask())
    next(call)
    server.engine.step_error = RuntimeError("secret of the device")
    assert fails(StatusCode.UNAVAILABLE, lambda: list(call)) == "the engine has stopped"
    assert stub.HealthCheck(pb.HealthCheckRequest()).message == "the engine has stopped"


def test_a_key(make_server, stub_of, fails, tmp_path):
    file = tmp_path / "keys"
    file.write_text("secret\n")
    stub = stub_of(make_server(api_key_file=str(file)))
    metadata = (("authorization", "Bearer secret"),)
    assert len(list(stub.Generate(ask(max_tokens=1), metadata=metadata))) == 2
    fails(StatusCode.UNAUTHENTICATED, lambda: list(stub.Generate(ask())))
    fails(StatusCode.UNAUTHENTICATED, lambda: stub.GetModelInfo(pb.GetModelInfoRequest()))


def test_protocols_share_their_queue(make_server, stub_of, fails):
    server = make_server(max_waiting=1)
    call = stub_of(server).Generate(ask())
    next(call)
    with Client(server.target) as client:
        assert "max_waiting" in fails(StatusCode.RESOURCE_EXHAUSTED, lambda: list(client.generate("abc")))
    call.cancel()


def test_health_and_reflection(server):
    with grpc.insecure_channel(server.target) as channel:
        request = health_pb2.HealthCheckRequest(service=VLLM_NAME)
        assert health_pb2_grpc.HealthStub(channel).Check(request).status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert VLLM_NAME in database.get_services()
        described = database.FindFileContainingSymbol(VLLM_NAME)
        assert "GetTokenizer" in [method.name for method in described.service[0].method]
