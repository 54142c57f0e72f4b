"""OpenAI's completions and chats: from a request's body to prompt and parameters, from its output to a response's body.

No endpoint knows where bodies come from: a file, or HTTP.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, Logprob, SamplingParams
from jaxserve.served_model import ServedModel, any_of

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

SAMPLING = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs"}
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "stream_options", "user",
}  # fmt: skip
"""Body parameters that clients write and that no output depends on."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Body parameters that clients write although only these values can be served; null is always one."""


class Endpoint(ABC):
    """One of OpenAI's two ways to ask for the same: how its bodies say it, and how they are answered."""

    path: ClassVar[str]
    object: ClassVar[str]
    """What its responses call themselves."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Sampling parameters that neither a body nor the model gives."""

    def parse(self, body: Mapping[str, Any], model: ServedModel, where: str) -> tuple[ParsedPrompt, dict[str, Any]]:
        """The prompt and the sampling parameters that a request's body gives. Raises RequestError, naming the field.

        A door that serves one of the NEUTRAL takes it out of the body first; errors call the door ``where``.
        """
        given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        if "model" in given:
            model.check_name(given.pop("model"))
        for name, neutral in NEUTRAL.items():
            if (value := given.pop(name, neutral[0])) not in neutral:
                raise RequestError(f"{name} must be {any_of(neutral)} {where}, got {value!r:.80}")
        if "max_completion_tokens" in given:
            given["max_tokens"] = given.pop("max_completion_tokens")
        prompt = self._take_prompt(given)
        if unknown := sorted(given.keys() - SAMPLING):
            known = ", ".join(sorted(SAMPLING))
            raise RequestError(f"unknown parameter {unknown[0]!r} for {self.path}; known: {known}")
        return prompt, given

    def response(self, response_id: str, completions: Sequence[Completion], model: ServedModel) -> dict[str, Any]:
        """The body that answers a request whose choices are these, all of them ended."""
        num_prompt_tokens = sum(len(completion.prompt_token_ids) for completion in completions)
        num_output_tokens = sum(len(completion.token_ids) for completion in completions)
        return {
            "id": response_id,
            "object": self.object,
            "created": int(time.time()),
            "model": model.names[0],
            "choices": [
                {
                    "index": index,
                    **self._content(completion.text),
                    "logprobs": None if completion.logprobs is None else self._logprobs(completion, model.tokenizer),
                    "finish_reason": completion.finish_reason,
                }
                for index, completion in enumerate(completions)
            ],
            "usage": {
                "prompt_tokens": num_prompt_tokens,
                "completion_tokens": num_output_tokens,
                "total_tokens": num_prompt_tokens + num_output_tokens,
            },
        }

    @abstractmethod
    def _take_prompt(self, given: dict[str, Any]) -> ParsedPrompt:
        """Take the prompt out of a body, and leave sampling parameters by SamplingParams' names."""

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """The text as a choice has it."""

    @abstractmethod
    def _logprobs(self, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
        """The log-probabilities as a choice has them."""


class ChatCompletions(Endpoint):
    path = "/v1/chat/completions"
    object = "chat.completion"
    defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}

    def _take_prompt(self, given: dict[str, Any]) -> ParsedPrompt:
        messages = given.pop("messages", None)
        if not isinstance(messages, list):
            raise RequestError(f"messages must be a list of at least one message, got {messages!r:.80}")
        # Chats ask for log-probabilities with a switch and a number.
        wanted, num_top = given.pop("logprobs", False), given.pop("top_logprobs", None)
        if not isinstance(wanted, bool):
            raise RequestError(f"logprobs must be true or false for {self.path}, got {wanted!r:.80}")
        if num_top is not None and not wanted:
            raise RequestError(f"top_logprobs needs logprobs to be true, got {num_top!r:.80} without")
        if wanted:
            given["logprobs"] = num_top or 0
        return ParsedPrompt(messages=messages)

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _logprobs(self, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
        num_top = completion.params.logprobs or 0
        return {"content": [_chat_position(position, num_top, tokenizer) for position in completion.logprobs or ()]}


class Completions(Endpoint):
    path = "/v1/completions"
    object = "text_completion"

    def _take_prompt(self, given: dict[str, Any]) -> ParsedPrompt:
        prompt = given.pop("prompt", None)
        if isinstance(prompt, str):
            return ParsedPrompt(prompt)
        if isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt):
            return ParsedPrompt(token_ids=prompt)
        raise RequestError(f"prompt must be a string or a list of token ids, got {prompt!r:.80}")

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
        positions = completion.logprobs or []
        return {
            "tokens": [_completion_token(tokenizer.token_bytes(token_id)) for token_id in completion.token_ids],
            # The first entry of a position is the chosen token.
            "token_logprobs": [next(iter(position.values())).logprob for position in positions],
            "top_logprobs": [_completion_position(position, tokenizer) for position in positions],
            "text_offset": _text_offsets(completion, tokenizer),
        }


ENDPOINTS: tuple[Endpoint, ...] = (ChatCompletions(), Completions())


def _chat_position(position: dict[int, Logprob], num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = []
    for token_id, entry in position.items():
        raw = tokenizer.token_bytes(token_id)
        tokens.append({"token": raw.decode(errors="backslashreplace"), "logprob": entry.logprob, "bytes": list(raw)})
    # The chosen token need not be among the likeliest.
    likeliest = sorted(tokens, key=itemgetter("logprob"), reverse=True)
    return {**tokens[0], "top_logprobs": likeliest[:num_top]}


def _completion_position(position: dict[int, Logprob], tokenizer: Tokenizer) -> dict[str, float]:
    """By text, the likeliest first, always with the chosen token; where several tokens have a text, the likeliest."""
    by_text: dict[str, float] = {}
    for token_id, entry in sorted(position.items(), key=lambda item: item[1].logprob, reverse=True):
        by_text.setdefault(_completion_token(tokenizer.token_bytes(token_id)), entry.logprob)
    return by_text


def _completion_token(raw: bytes) -> str:
    """A token as OpenAI's completions write it: parts of characters by their bytes, or they would all look alike."""
    text = raw.decode(errors="backslashreplace")
    return text if text.encode() == raw else f"bytes:{text}"


def _text_offsets(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """Where in the text each token's begins; for the later parts of a character, where the character does."""
    stream = tokenizer.decode_stream(completion.params.skip_special_tokens, completion.prompt_token_ids)
    num_characters, offsets, offset = len(completion.text), [], 0
    for token_id in completion.token_ids:
        offsets.append(min(offset, num_characters))  # a stop string is left out of the text
        offset += len(stream.step(token_id))
    return offsets
