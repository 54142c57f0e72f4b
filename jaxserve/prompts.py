"""Prompts and conversations as ``LLM`` takes them, in vLLM's types or any iterable, and as every door has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, NotRequired, TypedDict

from jaxserve.errors import RequestError
from jaxserve.sampling_params import as_integer


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids; ``prompt``, if given, is the text that the output shows for them."""

    prompt_token_ids: Iterable[int]
    prompt: NotRequired[str | None]


Prompt = str | Iterable[int] | TextPrompt | TokensPrompt
Message = Mapping[str, Any]

_UNORDERED_OR_BYTES = set | frozenset | bytes | bytearray | memoryview


class ParsedPrompt(NamedTuple):
    """One prompt of any door: token ids, which go before the text that is shown for them, a text, or a chat."""

    text: str | None = None
    token_ids: list[int] | None = None
    messages: Any = None
    """A chat's, unchecked: the tokenizer does that."""
    template_options: Mapping[str, Any] = MappingProxyType({})
    """What else the chat template is rendered with: see Tokenizer.apply_chat_template."""
    add_special_tokens: bool = True
    """Whether the tokenizer puts the model's own around the text; a chat's template has written them itself."""


def parse_prompts(prompts: Prompt | Iterable[Prompt]) -> list[ParsedPrompt]:
    """One prompt, text or token ids, is a list of one. Raises RequestError, naming the prompt, for what is neither."""
    if isinstance(prompts, str) or hasattr(prompts, "keys"):
        return [_parse_prompt(0, prompts)]
    every = _as_list("prompts", "a prompt or a list of prompts", prompts)
    if every and _is_integer(every[0]):
        return [_parse_prompt(0, every)]
    return [_parse_prompt(index, prompt) for index, prompt in enumerate(every)]


def parse_conversations(messages: Iterable[Message] | Iterable[Iterable[Message]]) -> list[list[Message]]:
    """One conversation is a list of one. Raises RequestError for what is no list; messages check themselves later."""
    every = _as_list("messages", "a list of messages or of such lists", messages)
    if every and isinstance(every[0], Mapping):
        return [every]
    return [_as_list(f"messages[{index}]", "a list of messages", one) for index, one in enumerate(every)]


def _parse_prompt(index: int, prompt: Any) -> ParsedPrompt:
    name = f"prompts[{index}]"
    if isinstance(prompt, str):
        return ParsedPrompt(str(prompt))
    if not isinstance(prompt, Mapping):
        return ParsedPrompt(token_ids=_token_ids(name, prompt))
    given = {key: value for key, value in prompt.items() if value is not None}
    text, token_ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
    if given or (text is None and token_ids is None):
        raise RequestError(f"{name} must have prompt or prompt_token_ids, and nothing else, got {list(prompt)!r:.80}")
    if not isinstance(text, str | None):
        raise RequestError(f"{name}.prompt must be a text, got {text!r:.80}")
    return ParsedPrompt(text, None if token_ids is None else _token_ids(f"{name}.prompt_token_ids", token_ids))


def _token_ids(name: str, value: Any) -> list[int]:
    what = "a list of token ids" if name.endswith("ids") else "a text or a list of token ids"
    try:
        return [as_integer(token_id) for token_id in _as_list(name, what, value)]
    except TypeError:
        raise RequestError(f"{name} must be {what}, got {value!r:.80}") from None


def _as_list(name: str, what: str, value: Any) -> list[Any]:
    """The elements of an iterable that has an order: an array, a generator, but no dict, whose keys nobody means."""
    if hasattr(value, "tolist"):  # numpy's, jax's and others: Python's own numbers, all at once
        value = value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, str | _UNORDERED_OR_BYTES) or hasattr(value, "keys"):
        raise RequestError(f"{name} must be {what}, got {value!r:.80}")
    return list(value)


def _is_integer(value: object) -> bool:
    try:
        as_integer(value)
    except TypeError:
        return False
    return True
