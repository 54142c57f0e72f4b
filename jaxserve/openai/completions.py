"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from jaxserve.errors import RequestError
from jaxserve.openai.choices import Choice, ChoicesEndpoint
from jaxserve.openai.endpoint import MAX_PROMPTS, NO_TOOLS, Ask
from jaxserve.openai.fields import take_switch
from jaxserve.openai.response import Part
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, Logprob
from jaxserve.served_model import ServedModel

if TYPE_CHECKING:
    from jaxserve.tokenizer import TextStream, Tokenizer


class Completions(ChoicesEndpoint):
    path = "/v1/completions"
    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**ChoicesEndpoint.neutral, **NO_TOOLS}

    def _take(self, given: dict[str, Any], model: ServedModel) -> Ask:
        ask = super()._take(given, model)
        echo, sampling = take_switch(given, "echo"), dict(ask.sampling)
        if echo and (given.get("logprobs") is not None or given.get("max_tokens") == 0):
            sampling["prompt_logprobs"] = given.get("logprobs", 0)
        return replace(ask, prompts=_take_prompts(given), sampling=sampling, echo=echo)

    def choice(self, index: int, completion: Completion, ask: Ask, model: ServedModel) -> Choice:
        return TextChoice(index, completion, ask.echo, model.tokenizer)


def _take_prompts(given: dict[str, Any]) -> Sequence[ParsedPrompt]:
    prompt = given.pop("prompt", None)
    if (one := _parsed(prompt)) is not None:
        return [one]
    several = [_parsed(element) for element in prompt] if isinstance(prompt, list) else []
    if not several or not all(several):
        raise RequestError(f"prompt must be a string, a list of token ids, or a list of those, got {prompt!r:.80}")
    if len(several) > MAX_PROMPTS:
        raise RequestError(f"prompt must be a list of at most {MAX_PROMPTS} prompts, got {len(several)}")
    return [prompt for prompt in several if prompt is not None]


def _parsed(prompt: object) -> ParsedPrompt | None:
    """A text or token ids; None for anything else."""
    if isinstance(prompt, str):
        return ParsedPrompt(prompt)
    if isinstance(prompt, list) and prompt and all(type(token_id) is int for token_id in prompt):
        return ParsedPrompt(token_ids=prompt)
    return None


class TextChoice:
    """A prompt's continuation, after the prompt itself where it is echoed."""

    def __init__(self, index: int, completion: Completion, echo: bool, tokenizer: Tokenizer) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._prompt_token_ids = completion.prompt_token_ids
        self._echoed: str | None = None
        """What is still to be written of the prompt."""
        if echo:
            text = completion.prompt
            self._echoed = tokenizer.decode(self._prompt_token_ids) if text is None else text
        self._has_logprobs = completion.logprobs is not None
        self._stream = tokenizer.decode_stream(completion.params.skip_special_tokens, self._prompt_token_ids)
        self._offset = self._num_characters = len(self._echoed or "")

    def whole(self, part: Part) -> dict[str, Any]:
        return self.chunk(part)

    def chunk(self, part: Part) -> dict[str, Any]:
        prompt, self._echoed = self._echoed, None
        self._num_characters += len(part.text)
        return {
            "index": self._index,
            "text": part.text if prompt is None else prompt + part.text,
            "logprobs": self._logprobs(part, echoes=prompt is not None) if self._has_logprobs else None,
            "finish_reason": part.finish_reason,
        }

    def _logprobs(self, part: Part, echoes: bool) -> dict[str, Any]:
        token_ids, positions = part.token_ids, [*(part.logprobs or ())]
        offsets, self._offset = _offsets(self._stream, token_ids, self._offset)
        if part.finish_reason is not None:  # a stop string is left out of the text
            offsets = [min(offset, self._num_characters) for offset in offsets]
        if echoes:
            stream = self._tokenizer.decode_stream(skip_special_tokens=True)
            offsets = _offsets(stream, self._prompt_token_ids, 0)[0] + offsets
            token_ids = self._prompt_token_ids + token_ids
            positions = [*(part.prompt_logprobs or ()), *positions]
        return {
            "tokens": [_token(self._tokenizer.token_bytes(token_id)) for token_id in token_ids],
            # The first entry of a position is the chosen token; a prompt's first token has none.
            "token_logprobs": [position and next(iter(position.values())).logprob for position in positions],
            "top_logprobs": [position and self._position(position) for position in positions],
            "text_offset": offsets,
        }

    def _position(self, position: Mapping[int, Logprob]) -> dict[str, float]:
        """By text, the likeliest first, always with the chosen token; of tokens with one text, the likeliest."""
        by_text: dict[str, float] = {}
        for token_id, entry in sorted(position.items(), key=lambda item: item[1].logprob, reverse=True):
            by_text.setdefault(_token(self._tokenizer.token_bytes(token_id)), entry.logprob)
        return by_text


def _token(raw: bytes) -> str:
    """A token as OpenAI's completions write it: parts of characters by their bytes, or they would all look alike."""
    text = raw.decode(errors="backslashreplace")
    return text if text.encode() == raw else f"bytes:{text}"


def _offsets(stream: TextStream, token_ids: Sequence[int], offset: int) -> tuple[list[int], int]:
    """Where in the text each token's begins, from ``offset`` on, for the later parts of a character where the character
    does; and where the last one's ends."""
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(stream.step(token_id))
    return offsets, offset
