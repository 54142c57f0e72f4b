"""Between the messages of ``jaxserve.v1`` and the engine's own types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import FinishReason, Logprob, RequestDelta
from jaxserve.sampling_params import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_STRINGS, SamplingParams
from jaxserve.served_model import ServedModel, TokenLimit
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

NO_TOKEN_LIMIT = -1
"""max_tokens that stands for None: continue up to max_model_len."""
FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


MAX_REQUEST_ID_CHARACTERS = 128
MAX_UINT32 = 2**32 - 1
MAX_TOKEN_ID_BYTES = 5
MAX_CHARACTER_BYTES = 4
MIN_REQUEST_BYTES = 1024 * 1024
"""What any request may hold, however short the prompts that are served."""
RESPONSE_BYTES = 64 * 1024
"""Size at which an output is divided in any case: making one response must not hold up the others."""
LARGEST_USAGE = pb.Usage(
    prompt_tokens=MAX_UINT32,
    output_tokens=MAX_UINT32,
    ttft_seconds=1.0,
    scheduling_delay_seconds=1.0,
    num_preemptions=MAX_UINT32,
    num_stalls=MAX_UINT32,
)


LISTS = ("stop", "bad_words", "logit_bias", "stop_token_ids", "allowed_token_ids")
"""Fields of sampling, in the messages of all protocols, that hold any number of values."""


def check_lists(message: Message, model: ServedModel) -> None:
    """Raise RequestError for more values than may be, before anything is made of them."""
    limits = {"stop": MAX_STOP_STRINGS, "bad_words": MAX_BAD_WORDS, "logit_bias": MAX_LOGIT_BIAS}
    for name in LISTS:
        number, limit = len(getattr(message, name, ())), limits.get(name, model.vocab_size)
        if number > limit:
            what = "values" if name in limits else "token ids"
            raise RequestError(f"{name} must be at most {limit} {what}, got {number}")


def check_request_id(name: str, value: str) -> None:
    """Raise RequestError for what is too long to name a request; errors call it ``name``."""
    if len(value) > MAX_REQUEST_ID_CHARACTERS:
        raise RequestError(f"{name} must have at most {MAX_REQUEST_ID_CHARACTERS} characters, got {len(value)}")


def sampling_params(message: pb.SamplingParams, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
    """The fields that the caller set; the others have the model's defaults, or SamplingParams'. Raises RequestError."""
    check_lists(message, model)
    given = _given(message)
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
        if name in given:
            given[name] = tuple(given[name])
    if "structured_outputs" in given:
        given["structured_outputs"] = structured_outputs(given["structured_outputs"])
    return model.sampling_params(given, num_prompt_tokens)


def _given(message: pb.SamplingParams | None) -> dict[str, Any]:
    """The fields that the caller set, as protobuf has them; no max_tokens is None."""
    given = {field.name: value for field, value in message.ListFields()} if message is not None else {}
    if given.get("max_tokens") == NO_TOKEN_LIMIT:
        given["max_tokens"] = None
    return given


def structured_outputs(message: Message) -> dict[str, Any]:
    """The field of ``constraint`` that is set, by its name; choices as a list."""
    name = message.WhichOneof("constraint")
    if name is None:
        return {}
    value = getattr(message, name)
    return {name: list(value.choices) if name == "choice" else value}


def max_request_bytes(model: ServedModel) -> int | None:
    """Of a request that can be served; None where the tokenizer sets no bound."""
    characters = model.tokenizer.token_length.max_characters
    if characters is None:
        return None
    token_bytes = max(characters * MAX_CHARACTER_BYTES, MAX_TOKEN_ID_BYTES)
    return max(model.max_model_len * token_bytes, MIN_REQUEST_BYTES)


def token_limit(message: Message, model: ServedModel) -> TokenLimit:
    """Of the prompt or the ids in ``message``."""
    whole = isinstance(message, pb.GenerateRequest) and not message.sampling_params.HasField("truncate_prompt_tokens")
    return model.prompt_limit if whole else model.text_limit


def check_size(message: pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest, model: ServedModel) -> None:
    """Raise RequestError for more items than tokens may be, before anything is made of them."""
    match message:
        case pb.DetokenizeRequest():
            name, number = "token_ids", len(message.token_ids)
        case pb.GenerateRequest() if message.HasField("token_ids"):
            name, number = "prompt", len(message.token_ids.ids)
        case _:
            name, number = "messages", len(message.chat.messages)
    limit = token_limit(message, model)
    if number > limit.num_tokens:
        raise RequestError(f"{name} of {number} items exceeds {limit.name} {limit.num_tokens}")


def prompt_token_ids(message: pb.GenerateRequest | pb.TokenizeRequest, model: ServedModel) -> list[int]:
    """The prompt as token ids, through tokenizer and chat template where needed. Raises RequestError."""
    match message.WhichOneof("prompt"):
        case "text":
            prompt = ParsedPrompt(message.text)
        case "chat":
            turns = [{"role": turn.role, "content": turn.content} for turn in message.chat.messages]
            prompt = ParsedPrompt(messages=turns)
        case "token_ids":
            assert isinstance(message, pb.GenerateRequest)
            prompt = ParsedPrompt(token_ids=list(message.token_ids.ids))
        case _:
            raise RequestError("prompt must be given, got none")
    sampling = message.sampling_params if isinstance(message, pb.GenerateRequest) else None
    return model.token_ids(prompt, token_limit(message, model), _given(sampling))


def text_of(message: pb.DetokenizeRequest, model: ServedModel) -> str:
    """The text of the token ids. Raises RequestError."""
    skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
    return model.text(list(message.token_ids), skip)


def position_logprobs(position: Mapping[int, Logprob] | None) -> pb.PositionLogprobs:
    """The candidates of one position; none for the first prompt token."""
    candidates = [
        pb.TokenLogprob(token_id=token_id, logprob=entry.logprob, rank=entry.rank)
        for token_id, entry in (position or {}).items()
    ]
    return pb.PositionLogprobs(candidates=candidates)


class ResponseRoom:
    """How much of an output's parts one response holds, so that none exceeds ``max_message_bytes``.

    Raises RequestError where the least that a response holds may be too much.
    """

    def __init__(self, request_id: str, params: SamplingParams, max_message_bytes: int) -> None:
        largest = pb.GenerateResponse(
            request_id=request_id,
            token_ids=[MAX_UINT32],
            logprobs=[] if params.logprobs is None else [_largest_position(params.logprobs)],
            finish_reason=pb.FINISH_REASON_ABORT,
            stop_string=max(params.stop or (), key=lambda stop: len(stop.encode()), default=""),
            usage=LARGEST_USAGE,
        )
        position = pb.GenerateResponse(prompt_logprobs=[_largest_position(params.prompt_logprobs or 0)])
        # Text, prompt log-probabilities and further tokens may come together; four bytes are a field's tag and length.
        third_bytes = (min(max_message_bytes - largest.ByteSize(), RESPONSE_BYTES) - 12) // 3
        self.num_positions = third_bytes // position.ByteSize()
        self.num_characters = third_bytes // MAX_CHARACTER_BYTES
        token = pb.GenerateResponse(token_ids=largest.token_ids, logprobs=largest.logprobs)
        self.num_tokens = 1 + max(0, third_bytes) // token.ByteSize()
        if min(self.num_positions, self.num_characters) < 1:
            raise RequestError(
                f"stop strings and logprobs may need responses of over {largest.ByteSize() + 3 * position.ByteSize()} "
                f"bytes, which exceeds max_message_bytes {max_message_bytes}"
            )


def _largest_position(num_alternatives: int) -> pb.PositionLogprobs:
    candidate = pb.TokenLogprob(token_id=MAX_UINT32, logprob=-1.0, rank=MAX_UINT32)
    return pb.PositionLogprobs(candidates=[candidate] * (1 + num_alternatives))


def generate_responses(
    delta: RequestDelta, num_output_tokens: int, room: ResponseRoom
) -> Iterator[pb.GenerateResponse]:
    """One delta, in several responses where it is too much for one; the last tokens and usage are in the last.

    ``num_output_tokens`` counts this delta and all before it.
    """
    prompt, text = delta.prompt_logprobs or [], delta.text
    while len(prompt) > room.num_positions:
        first, prompt = prompt[: room.num_positions], prompt[room.num_positions :]
        yield pb.GenerateResponse(request_id=delta.request_id, prompt_logprobs=map(position_logprobs, first))
    while len(text) > room.num_characters:
        yield pb.GenerateResponse(request_id=delta.request_id, text=text[: room.num_characters])
        text = text[room.num_characters :]
    token_ids, logprobs = delta.token_ids, delta.logprobs or []
    while len(token_ids) > room.num_tokens:
        yield pb.GenerateResponse(
            request_id=delta.request_id,
            token_ids=token_ids[: room.num_tokens],
            logprobs=map(position_logprobs, logprobs[: room.num_tokens]),
        )
        token_ids, logprobs = token_ids[room.num_tokens :], logprobs[room.num_tokens :]
    response = pb.GenerateResponse(
        request_id=delta.request_id,
        text=text,
        token_ids=token_ids,
        logprobs=map(position_logprobs, logprobs),
        prompt_logprobs=map(position_logprobs, prompt),
    )
    if delta.finish_reason is not None:
        response.finish_reason = FINISH_REASONS[delta.finish_reason]
        response.usage.CopyFrom(
            pb.Usage(
                prompt_tokens=delta.num_prompt_tokens,
                output_tokens=num_output_tokens,
                ttft_seconds=delta.metrics.ttft_seconds,
                scheduling_delay_seconds=delta.metrics.scheduling_delay_seconds,
                num_preemptions=delta.metrics.num_preemptions,
                num_stalls=delta.metrics.num_stalls,
            )
        )
    if isinstance(delta.stop_reason, str):
        response.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        response.stop_token_id = delta.stop_reason
    yield response


def model_info(engine: Engine) -> pb.GetModelInfoResponse:
    """What is served here, and its limits."""
    config, model = engine.config, engine.model_config
    return pb.GetModelInfoResponse(
        model=config.model,
        architecture=model.architecture,
        dtype=config.dtype,
        vocab_size=model.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        max_model_len=config.max_model_len,
        token_budget=config.token_budget,
        max_num_seqs=config.max_num_seqs,
        scheduler=config.scheduler,
    )
