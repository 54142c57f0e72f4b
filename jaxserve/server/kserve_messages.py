"""Between the messages of ``inference.GRPCInferenceService`` and the engine's own types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import orjson

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel, UnknownModelError
from jaxserve.server.messages import MAX_REQUEST_ID_CHARACTERS, check_request_id
from jaxserve.server.proto.inference import grpc_service_pb2 as pb

VERSION = "1"
"""Of the one model."""
PLATFORM = "jaxserve"
FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"
LENGTH_BYTES = 4
"""Before an element of a raw BYTES tensor."""


class Tensor(NamedTuple):
    """Of one element, of one of these types."""

    datatype: str
    optional: bool = True


TEXT_OUTPUT = "text_output"
INPUTS = {
    "text_input": Tensor("BYTES", optional=False),
    "stream": Tensor("BOOL"),
    "sampling_parameters": Tensor("BYTES"),
    "exclude_input_in_output": Tensor("BOOL"),
}
CONFIG_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL}
SAMPLING = {f.name for f in fields(SamplingParams)} - {
    "n", "best_of", "logprobs", "prompt_logprobs", "logprob_start_len",
}  # fmt: skip
"""What may change a text."""


@dataclass(frozen=True)
class Ask:
    """What a request asks for."""

    prompt: str
    sampling: Mapping[str, Any]
    """Of SamplingParams, the fields that are given."""
    stream: bool
    echo: bool
    """Whether the output begins with the prompt."""
    empty_final: bool
    """Whether a response without output is the last."""

    @property
    def echoed(self) -> str:
        """What the output begins with."""
        return self.prompt if self.echo else ""

    def prepare(self, model: ServedModel) -> tuple[list[int], SamplingParams]:
        """For the engine. Raises RequestError."""
        token_ids = model.token_ids(ParsedPrompt(self.prompt), model.prompt_limit, self.sampling)
        return token_ids, model.sampling_params(self.sampling, len(token_ids))


def parse(request: pb.ModelInferRequest) -> Ask:
    """Raises RequestError, naming what is wrong, and UnknownModelError for another version."""
    check_request_id("id", request.id)
    check_version(request.model_version)
    parameters = dict(request.parameters)
    empty_final = parameters.pop(EMPTY_FINAL, pb.InferParameter())
    for name in parameters:
        raise RequestError(f"unknown parameter {name!r:.80}; sampling parameters go into the input sampling_parameters")
    for output in request.outputs:
        if output.name != TEXT_OUTPUT:
            raise RequestError(f"unknown output {output.name!r:.80}; known: {TEXT_OUTPUT}")
        _check_no_parameters(output)
    given = _inputs(request)
    if "text_input" not in given:
        raise RequestError("input text_input must be given, got none")
    stream = given.get("stream", False)
    return Ask(
        prompt=_text("text_input", given["text_input"]),
        sampling=_sampling(_text("sampling_parameters", given.get("sampling_parameters", b"{}"))),
        stream=stream,
        # As with Triton's vLLM backend, whose users these tensors are for.
        echo=not given.get("exclude_input_in_output", stream),
        empty_final=empty_final.bool_param,
    )


def check_version(version: str) -> None:
    """Raise UnknownModelError for any but the one there is."""
    if version not in ("", VERSION):
        raise UnknownModelError(f"model_version must be {VERSION!r}, which is served here, got {version!r:.80}")


def _inputs(request: pb.ModelInferRequest) -> dict[str, Any]:
    """The one element of each tensor, bool or bytes."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents must have one entry for each of {len(request.inputs)}, got {len(raw)}")
    given: dict[str, Any] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in INPUTS:
            raise RequestError(f"unknown input {name!r:.80}; known: {', '.join(INPUTS)}")
        if name in given:
            raise RequestError(f"input {name} must be given once, got it again")
        if tensor.datatype != INPUTS[name].datatype:
            raise RequestError(f"input {name} must be of datatype {INPUTS[name].datatype}, got {tensor.datatype!r:.80}")
        if list(tensor.shape) != [1]:
            raise RequestError(f"input {name} must have shape [1], got {list(tensor.shape)!s:.80}")
        _check_no_parameters(tensor)
        given[name] = _raw_element(name, raw[index]) if raw else _element(tensor)
    return given


def _check_no_parameters(
    tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferRequest.InferRequestedOutputTensor,
) -> None:
    for name in tensor.parameters:
        raise RequestError(f"{tensor.name} must have no parameters, got {name!r:.80}")


def _element(tensor: pb.ModelInferRequest.InferInputTensor) -> bool | bytes:
    contents = tensor.contents
    elements = contents.bool_contents if tensor.datatype == "BOOL" else contents.bytes_contents
    if len(elements) != 1:
        raise RequestError(f"input {tensor.name} must hold one element, got {len(elements)}")
    return elements[0]


def _raw_element(name: str, raw: bytes) -> bool | bytes:
    if INPUTS[name].datatype == "BOOL":
        if raw not in (b"\0", b"\1"):
            raise RequestError(f"input {name} must be one byte, 0 or 1, got {raw!r:.80}")
        return raw == b"\1"
    length = int.from_bytes(raw[:LENGTH_BYTES], "little")
    if len(raw) != LENGTH_BYTES + length:
        raise RequestError(f"input {name} must be {LENGTH_BYTES} bytes of length and one text, got {raw!r:.80}")
    return raw[LENGTH_BYTES:]


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestError(f"input {name} must be UTF-8, got {value!r:.80}") from None


def _sampling(text: str) -> dict[str, Any]:
    try:
        given = orjson.loads(text)
    except orjson.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise RequestError(f"sampling_parameters must be a JSON object, got {text!r:.80}")
    if unknown := sorted(given.keys() - SAMPLING):
        raise RequestError(f"unknown sampling parameter {unknown[0]!r:.80}; known: {', '.join(sorted(SAMPLING))}")
    # Null leaves a field to the server, but for max_tokens, where it is no limit.
    given = {name: value for name, value in given.items() if value is not None or name == "max_tokens"}
    return {name: value if name == "stop" else _unquoted(value) for name, value in given.items()}


def _unquoted(value: Any) -> Any:
    """Triton's clients write numbers as strings, too, and booleans as Python does."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value.lower())
    except orjson.JSONDecodeError:
        return value


class Reply:
    """Writes the responses to one request."""

    def __init__(self, request_id: str, model_name: str) -> None:
        self._id, self._model_name = request_id, model_name

    def output(self, text: str, is_final: bool) -> pb.ModelInferResponse:
        """The next piece of the output."""
        encoded = text.encode()
        response = self._response(is_final)
        response.outputs.add(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)
        return response

    def end(self) -> pb.ModelInferResponse:
        """A last response that has no output."""
        return self._response(is_final=True)

    def _response(self, is_final: bool) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=self._model_name, model_version=VERSION, id=self._id)
        response.parameters[FINAL].bool_param = is_final
        return response


def failure(request: pb.ModelInferRequest, message: str) -> pb.ModelStreamInferResponse:
    """The last response to a request of a stream that could not be served."""
    reply = Reply(request.id[:MAX_REQUEST_ID_CHARACTERS], request.model_name[:MAX_REQUEST_ID_CHARACTERS])
    return pb.ModelStreamInferResponse(error_message=message, infer_response=reply.end())


def metadata(model: ServedModel) -> pb.ModelMetadataResponse:
    """The names and types of its tensors."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.names[0],
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=name, datatype=of.datatype, shape=[1]) for name, of in INPUTS.items()],
        outputs=[tensor(name=TEXT_OUTPUT, datatype="BYTES", shape=[1])],
    )


def config(model: ServedModel) -> pb.ModelConfigResponse:
    """The same in Triton's words, and that requests may have many responses."""
    inputs = [
        pb.ModelInput(name=name, data_type=CONFIG_TYPES[of.datatype], dims=[1], optional=of.optional)
        for name, of in INPUTS.items()
    ]
    return pb.ModelConfigResponse(
        config=pb.ModelConfig(
            name=model.names[0],
            platform=PLATFORM,
            backend=PLATFORM,
            input=inputs,
            output=[pb.ModelOutput(name=TEXT_OUTPUT, data_type=pb.TYPE_STRING, dims=[1])],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
    )
