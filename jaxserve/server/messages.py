"""Between the messages of ``jaxserve.v1`` and the engine's own types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxserve.request import FinishReason, Logprob, RequestDelta, RequestError, SamplingParams
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


def sampling_params(message: pb.SamplingParams, engine: Engine, num_prompt_tokens: int) -> SamplingParams:
    """The fields that the caller set; the others have the model's defaults, or SamplingParams'. Raises RequestError."""
    given = {field.name: value for field, value in message.ListFields()}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    if given.get("max_tokens") == NO_TOKEN_LIMIT:
        given["max_tokens"] = None
    return SamplingParams.with_defaults(given, engine.sampling_defaults, engine.max_model_len - num_prompt_tokens)


def prompt_token_ids(message: pb.GenerateRequest | pb.TokenizeRequest, engine: Engine) -> list[int]:
    """The prompt as token ids, through tokenizer and chat template where needed. Raises RequestError."""
    match message.WhichOneof("prompt"):
        case "text":
            return engine.tokenizer.encode(message.text)
        case "chat":
            messages = [{"role": turn.role, "content": turn.content} for turn in message.chat.messages]
            text = engine.tokenizer.apply_chat_template(messages)
            return engine.tokenizer.encode(text, add_special_tokens=False)
        case "token_ids":
            assert isinstance(message, pb.GenerateRequest)
            return list(message.token_ids.ids)
    raise RequestError("prompt must be given, got none")


def text_of(message: pb.DetokenizeRequest, engine: Engine) -> str:
    """The text of the token ids. Raises RequestError."""
    limit = engine.tokenizer.vocab_size
    for token_id in message.token_ids:
        if token_id >= limit:
            raise RequestError(f"token_ids must be in [0, {limit - 1}], got {token_id}")
    skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
    return engine.tokenizer.decode(list(message.token_ids), skip_special_tokens=skip)


def position_logprobs(position: dict[int, Logprob] | None) -> pb.PositionLogprobs:
    """The candidates of one position; none for the first prompt token."""
    candidates = [
        pb.TokenLogprob(token_id=token_id, logprob=entry.logprob, rank=entry.rank)
        for token_id, entry in (position or {}).items()
    ]
    return pb.PositionLogprobs(candidates=candidates)


def generate_response(delta: RequestDelta, num_output_tokens: int) -> pb.GenerateResponse:
    """One delta; ``num_output_tokens`` counts this one and all before it, for the usage of the last."""
    response = pb.GenerateResponse(
        request_id=delta.request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[position_logprobs(position) for position in delta.logprobs or ()],
        prompt_logprobs=[position_logprobs(position) for position in delta.prompt_logprobs or ()],
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
    return response


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
