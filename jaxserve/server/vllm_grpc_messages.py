"""Between the messages of ``vllm.grpc.engine`` and the engine's own types."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import uuid
import zipfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, Logprob, RequestDelta
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel
from jaxserve.server.messages import check_lists, check_request_id, structured_outputs
from jaxserve.server.proto.vllm import vllm_engine_pb2 as pb

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.tokenizer import Tokenizer

REQUEST = {"request_id", "tokenized", "text", "sampling_params", "stream"}
SAMPLING = {f.name for f in fields(SamplingParams)}
UNSET: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": None, "skip_special_tokens": False,
}  # fmt: skip
"""What vLLM makes of fields that are left out; the model's own defaults are the gateway's business."""
ADVERTISED = ("temperature", "top_p", "top_k", "min_p")
"""Sampling defaults that gateways ask for."""
CHUNK_BYTES = 64 * 1024

Position = Mapping[int, Logprob] | None


def request_id(request: pb.GenerateRequest) -> str:
    """The caller's or a new one. Raises RequestError."""
    check_request_id("request_id", request.request_id)
    return request.request_id or uuid.uuid4().hex


def prompt(request: pb.GenerateRequest, model: ServedModel) -> ParsedPrompt:
    """Raises RequestError, also for what else the request has and nothing here can do."""
    _check_served(_given(request), REQUEST)
    match request.WhichOneof("input"):
        case "tokenized":
            number = len(request.tokenized.input_ids)
            if number > model.max_model_len:
                raise RequestError(f"tokenized of {number} input_ids exceeds max_model_len {model.max_model_len}")
            return ParsedPrompt(token_ids=list(request.tokenized.input_ids))
        case "text":
            return ParsedPrompt(request.text)
    raise RequestError("input must be given, got none")


def sampling(request: pb.GenerateRequest) -> dict[str, Any]:
    """The fields of sampling that are set, as protobuf has them."""
    return _given(request.sampling_params)


def completions(
    request: pb.GenerateRequest, request_id: str, token_ids: list[int], model: ServedModel
) -> list[Completion]:
    """The requests for the engine that one for n sequences makes, still without outputs. Raises RequestError."""
    params = _sampling_params(request.sampling_params, model, len(token_ids))
    return Completion.choices(request_id, token_ids, params)


def _sampling_params(message: pb.SamplingParams, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
    check_lists(message, model)
    given = _given(message)
    if structured := structured_outputs(message):
        name = message.WhichOneof("constraint")
        del given[name]
        given["structured_outputs"] = {"json": structured[name]} if name == "json_schema" else structured
    _check_served(given, SAMPLING)
    return model.sampling_params({**UNSET, **given}, num_prompt_tokens)


def _given(message: Message) -> dict[str, Any]:
    """The fields that are set; those without presence, if they are not zero."""
    return {field.name: value for field, value in message.ListFields()}


def _check_served(given: Mapping[str, Any], served: Container[str]) -> None:
    for name, value in given.items():
        if name not in served:
            raise RequestError(f"{name} cannot be served and must be left out, got {value!r:.80}")


def responses(stream: bool, index: int, delta: RequestDelta, completion: Completion) -> Iterator[pb.GenerateResponse]:
    """What the caller is told of a delta: each in a stream, else all of the completion that gathers them at its end."""
    if stream:
        if delta.token_ids or delta.prompt_logprobs:
            yield pb.GenerateResponse(chunk=_chunk(index, delta, completion))
    else:
        completion.add(delta)
        delta = delta._replace(
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            prompt_logprobs=completion.prompt_logprobs,
        )
    if delta.finish_reason is not None:
        yield pb.GenerateResponse(complete=_complete(index, delta, completion))


def _chunk(index: int, delta: RequestDelta, completion: Completion) -> pb.GenerateStreamChunk:
    return pb.GenerateStreamChunk(
        token_ids=delta.token_ids,
        prompt_tokens=delta.num_prompt_tokens,
        completion_tokens=len(delta.token_ids),
        output_logprobs=_output_logprobs(delta, completion.params),
        input_logprobs=_input_logprobs(delta, completion),
        index=index,
    )


def _complete(index: int, delta: RequestDelta, completion: Completion) -> pb.GenerateComplete:
    assert delta.finish_reason is not None
    complete = pb.GenerateComplete(
        output_ids=delta.token_ids,
        finish_reason=delta.finish_reason.value,
        prompt_tokens=delta.num_prompt_tokens,
        completion_tokens=len(delta.token_ids),
        output_logprobs=_output_logprobs(delta, completion.params),
        input_logprobs=_input_logprobs(delta, completion),
        index=index,
    )
    if isinstance(delta.stop_reason, str):
        complete.matched_stop_str = delta.stop_reason
    elif delta.stop_reason is not None:
        complete.matched_token_id = delta.stop_reason
    return complete


def _output_logprobs(delta: RequestDelta, params: SamplingParams) -> pb.OutputLogProbs | None:
    if not delta.logprobs:
        return None
    return pb.OutputLogProbs(
        token_ids=delta.token_ids,
        token_logprobs=[
            entry[token_id].logprob for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True)
        ],
        top_logprobs=_top_logprobs(delta.logprobs, params.logprobs),
    )


def _input_logprobs(delta: RequestDelta, completion: Completion) -> pb.InputLogProbs | None:
    if not delta.prompt_logprobs:
        return None
    # The first entry of a position is the prompt's own token; the first position has none.
    values = [next(iter(position.values())).logprob if position else None for position in delta.prompt_logprobs]
    return pb.InputLogProbs(
        token_ids=completion.prompt_token_ids,
        token_logprobs=[pb.InputTokenLogProb(value=value) for value in values],
        top_logprobs=_top_logprobs(delta.prompt_logprobs, completion.params.prompt_logprobs),
    )


def _top_logprobs(positions: Sequence[Position], number: int | None) -> list[pb.TopLogProbs]:
    if not number:
        return []
    found = []
    for position in positions:
        top = sorted((position or {}).items(), key=lambda item: item[1].rank)[:number]
        found.append(pb.TopLogProbs(token_ids=[token for token, _ in top], values=[entry.logprob for _, entry in top]))
    return found


def model_info(engine: Engine, model: ServedModel) -> pb.GetModelInfoResponse:
    """What is served here, and its limits."""
    defaults = {name: model.sampling_defaults[name] for name in ADVERTISED if name in model.sampling_defaults}
    return pb.GetModelInfoResponse(
        model_path=engine.config.model,
        is_generation=True,
        max_context_length=model.max_model_len,
        vocab_size=model.vocab_size,
        served_model_name=model.names[0],
        architectures=[engine.model_config.architecture],
        eos_token_ids=engine.eos_token_ids,
        max_req_input_len=model.max_model_len,
        default_sampling_params_json=json.dumps(defaults) if defaults else "",
    )


def tokenizer_archive(tokenizer: Tokenizer) -> bytes:
    """A zip of its files, the same for the same tokenizer: gateways know it by its hash."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder, zipfile.ZipFile(buffer, "w") as archive:
        tokenizer.save(Path(folder))
        for path in sorted(Path(folder).iterdir()):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def archive_chunks(archive: bytes) -> Iterator[pb.GetTokenizerChunk]:
    """In messages of any channel's size."""
    for start in range(0, len(archive), CHUNK_BYTES):
        is_last = start + CHUNK_BYTES >= len(archive)
        sha256 = hashlib.sha256(archive).hexdigest() if is_last else ""
        yield pb.GetTokenizerChunk(data=archive[start : start + CHUNK_BYTES], sha256=sha256)
