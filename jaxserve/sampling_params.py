"""How to continue a prompt: what a request may ask for, checked at the door."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from jaxserve.errors import RequestError
from jaxserve.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
"""Most alternatives per position that ``logprobs`` and ``prompt_logprobs`` may ask for, unless the engine is configured
for others (vLLM's default)."""
MAX_STOP_STRINGS = 16
MAX_CHOICES = 128
"""Outputs of a prompt."""
MAX_LOGIT_BIAS = 300
"""Tokens of a ``logit_bias`` (OpenAI's limit)."""
MAX_CACHE_SALT_CHARACTERS = 128
MAX_PRIORITY = 100
"""And with a minus the least: so nobody is overtaken for longer than 200 levels are worth."""
MAX_BAD_WORDS, MAX_BAD_WORD_CHARACTERS = 128, 128
MAX_INT32 = 2**31 - 1
MAX_SEED = MAX_INT32


class SoftLimit(int):
    """A ``max_tokens`` that the caller did not set: cut to what max_model_len leaves instead of refused."""


def as_integer(value: object) -> int:
    """Python's own integer for any kind of integer, numpy's and jax's included. Raises TypeError, also for booleans."""
    if isinstance(value, bool):
        raise TypeError("a boolean is no integer")
    return value if isinstance(value, int) else operator.index(value)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """Python's own value for a scalar of numpy's or jax's."""
    return value.item() if getattr(value, "shape", None) == () else value


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    number = _plain(value)
    ok = isinstance(number, int | float) and not isinstance(number, bool) and low <= number <= high
    if not ok or (open_low and number == low):
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r}")
    return number


def checked_integer(name: str, value: object, low: int, high: int) -> int:
    """The integer that ``value`` is. Raises RequestError, which calls it ``name``."""
    try:
        number = as_integer(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise RequestError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    return number


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise RequestError(f"{name} must be a list, got {value!r}")
    return tuple(value)


def _bias(value: object) -> dict[int, float]:
    """By token id. OpenAI's clients write ids as text, which is all that JSON's objects have."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias must be a mapping of at most {MAX_LOGIT_BIAS} tokens, got {value!r:.80}")
    bias = {}
    for token, amount in value.items():
        token_id = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token
        bias[checked_integer("logit_bias: token id", token_id, 0, MAX_INT32)] = _number("logit_bias", amount, -100, 100)
    return bias


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    return tuple(checked_integer(name, token_id, 0, MAX_INT32) for token_id in _as_tuple(name, value))


def _bad_words(value: object) -> tuple[str, ...]:
    words = _as_tuple("bad_words", value)
    if len(words) > MAX_BAD_WORDS or not all(
        isinstance(word, str) and word.strip() and len(word) <= MAX_BAD_WORD_CHARACTERS for word in words
    ):
        raise RequestError(
            f"bad_words must be at most {MAX_BAD_WORDS} strings of 1 to {MAX_BAD_WORD_CHARACTERS} characters that are "
            f"not blank, got {words!r:.200}"
        )
    return words


_OPTIONAL_INTEGERS = (
    ("seed", 0, MAX_SEED),
    ("logprobs", -1, MAX_INT32),
    ("prompt_logprobs", -1, MAX_INT32),
    ("truncate_prompt_tokens", -1, MAX_INT32),
    ("num_speculative_tokens", 0, MAX_INT32),
)
_SWITCHES = ("ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; names and defaults are vLLM's.

    n: outputs of a prompt; best_of: so many are made, and the n whose tokens are likeliest in the mean are kept.
    temperature: 0 is greedy.   top_k: 0 or -1 keeps the whole vocabulary.
    min_p: drops tokens less likely than ``min_p`` times the likeliest.
    presence_penalty, frequency_penalty: taken from a token's logit once it is in the output, and each time;
    repetition_penalty: divides it, or multiplies it where it is negative, once the token is in prompt or output.
    logit_bias: added to the logits of these tokens.
    allowed_token_ids: no others are made; bad_words: texts that the output does not hold, as far as their usual tokens
    make them.
    seed: makes a sampled request repeatable whatever it is batched with.
    min_tokens: as many are made before anything but max_tokens may end the output.
    max_tokens: None continues up to the engine's max_model_len, where its default ends too; 0, for prompt_logprobs
    alone, makes no output.
    stop, stop_token_ids: end the output; a stop string is left out of the text unless include_stop_str_in_output.
    logprobs, prompt_logprobs: that many alternatives per position besides the chosen token, up to the engine's
    max_logprobs; -1: the vocabulary. A prompt as long as max_model_len has prompt_logprobs and no output, unless
    max_tokens is set.
    logprob_start_len: the first so many prompt tokens have no prompt_logprobs (SGLang's name), so that they may come
    from the prefix cache: for the choices that continue one context.
    truncate_prompt_tokens: only so many of the prompt's last tokens are taken; -1: those that max_model_len leaves
    before max_tokens.
    spaces_between_special_tokens: whether the text may have what the tokenizer puts between special tokens.
    cache_salt: the request finds in the prefix cache only what others with the same salt have left there, so that no
    stranger can tell from the time to a first token what others have asked.
    priority: lower goes first, until others have waited for ten seconds a level longer.
    num_speculative_tokens: most drafts of a step where the engine makes any, 0 for none; they change no token, only how
    soon it comes.
    structured_outputs: what the output must be, also as a dict; it ends where it is whole, so not with ignore_eos.
    Numbers may be numpy's or jax's, lists any iterable; they become Python's own and tuples.
    Raises RequestError, naming the field and the limit.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str] | None = ()
    seed: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = SoftLimit(16)
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_start_len: int = 0
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    cache_salt: str | None = None
    priority: int = 0
    num_speculative_tokens: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": checked_integer("n", self.n, 1, MAX_CHOICES),
            "temperature": _number("temperature", self.temperature, 0.0, 100.0),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, open_low=True),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "top_k": checked_integer("top_k", self.top_k, -1, MAX_INT32),
            "priority": checked_integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2.0, 2.0),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True),
            "logit_bias": _bias(self.logit_bias),
            "min_tokens": checked_integer("min_tokens", self.min_tokens, 0, MAX_INT32),
            "logprob_start_len": checked_integer("logprob_start_len", self.logprob_start_len, 0, MAX_INT32),
            "bad_words": _bad_words(self.bad_words),
        }
        if self.best_of is not None:
            best_of = checked_integer("best_of", self.best_of, checked["n"], MAX_CHOICES)
            checked["best_of"] = best_of if best_of > checked["n"] else None
        for name, low, high in _OPTIONAL_INTEGERS:
            if (value := getattr(self, name)) is not None:
                checked[name] = checked_integer(name, value, low, high)
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1, got 0")
        if checked["logprob_start_len"] and self.prompt_logprobs is None:
            raise RequestError(f"logprob_start_len must be 0 without prompt_logprobs, got {self.logprob_start_len!r}")
        if self.max_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            checked["max_tokens"] = checked_integer("max_tokens", self.max_tokens, least, MAX_INT32)
            if checked["min_tokens"] > checked["max_tokens"] and not isinstance(self.max_tokens, SoftLimit):
                raise RequestError(f"min_tokens must not exceed max_tokens, {self.max_tokens}, got {self.min_tokens!r}")
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise RequestError("allowed_token_ids must hold at least one token id, got none")
            checked["allowed_token_ids"] = allowed
        for name in _SWITCHES:
            checked[name] = _plain(getattr(self, name))
            if not isinstance(checked[name], bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        if len(stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got {stop!r}")
        salt = self.cache_salt
        if salt is not None and not (isinstance(salt, str) and 1 <= len(salt) <= MAX_CACHE_SALT_CHARACTERS):
            raise RequestError(
                f"cache_salt must be a string of 1 to {MAX_CACHE_SALT_CHARACTERS} characters, got {salt!r}"
            )
        checked["stop"] = stop
        checked["stop_token_ids"] = _token_ids("stop_token_ids", self.stop_token_ids)
        checked["structured_outputs"] = StructuredOutputsParams.of(self.structured_outputs)
        if checked["structured_outputs"] is not None and checked["ignore_eos"]:
            raise RequestError("ignore_eos must be False with structured_outputs, got True")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def edits_logits(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        return bool(
            self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias
            or self.allowed_token_ids or self.bad_words or self.min_tokens or self.structured_outputs is not None
        )  # fmt: skip

    @property
    def masks_by_tokens(self) -> bool:
        """Whether a token may be allowed or not by those right before it."""
        return bool(self.bad_words or self.structured_outputs is not None)

    @classmethod
    def with_defaults(cls, given: Mapping[str, Any], defaults: Mapping[str, Any], num_room_tokens: int) -> Self:
        """The fields ``given`` by a request, the model's ``defaults`` for the others, then those of this class.

        A max_tokens that is not given is cut to the room that max_model_len leaves after the prompt: a request must not
        fail for a limit that it did not set. Raises RequestError.
        """
        limit = defaults.get("max_tokens", cls.max_tokens)
        if limit is not None:
            defaults = {**defaults, "max_tokens": SoftLimit(max(1, min(limit, num_room_tokens)))}
        return cls(**{**defaults, **given})

    @property
    def num_choices(self) -> int:
        """Outputs to make of a prompt."""
        return self.best_of or self.n

    @property
    def ranks_choices(self) -> bool:
        """Whether more are made than are kept."""
        return self.num_choices > self.n

    def of_choice(self, number: int) -> Self:
        """For one of several outputs of a prompt, numbered from 0: with seeds of their own they differ."""
        seed = None if self.seed is None else (self.seed + number) % (MAX_SEED + 1)
        logprobs = 0 if self.logprobs is None and self.ranks_choices else self.logprobs
        return replace(self, n=1, best_of=None, seed=seed, logprobs=logprobs)

    def max_output_tokens(self, num_room_tokens: int) -> int:
        """Output tokens to make at most where max_model_len leaves ``num_room_tokens``."""
        if self.max_tokens is None:
            return num_room_tokens
        return min(self.max_tokens, num_room_tokens) if isinstance(self.max_tokens, SoftLimit) else self.max_tokens
