"""A request's life: what the caller asks for, what the engine tracks, what the caller gets back."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple, Self

from jaxserve.errors import RequestError
from jaxserve.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
"""Most alternatives per position that ``logprobs`` and ``prompt_logprobs`` may ask for (vLLM's default)."""
MAX_STOP_STRINGS = 16
MAX_SEED = 2**31 - 1


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Logprob(NamedTuple):
    """Log-probability of one token under the model's unmodified distribution, and its rank (1 = most likely)."""

    logprob: float
    rank: int


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


def _integer(name: str, value: object, low: int, high: int) -> int:
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


_OPTIONAL_INTEGERS = (
    ("seed", 0, MAX_SEED),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt; names and defaults are vLLM's.

    temperature: 0 is greedy.   top_k: 0 or -1 keeps the whole vocabulary.
    min_p: drops tokens less likely than ``min_p`` times the likeliest.
    seed: makes a sampled request repeatable whatever it is batched with.
    max_tokens: None continues up to the engine's max_model_len, where its default ends too; 0, for prompt_logprobs
    alone, makes no output.
    stop, stop_token_ids: end the output; a stop string is left out of the text unless include_stop_str_in_output.
    logprobs, prompt_logprobs: that many alternatives per position besides the chosen token. A prompt as long as
    max_model_len has prompt_logprobs and no output, unless max_tokens is set.
    structured_outputs: what the output must be, also as a dict; it ends where it is whole, so not with ignore_eos.
    Numbers may be numpy's or jax's, lists any iterable; they become Python's own and tuples.
    Raises RequestError, naming the field and the limit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = SoftLimit(16)
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _number("temperature", self.temperature, 0.0, 100.0),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, open_low=True),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0),
            "top_k": _integer("top_k", self.top_k, -1, 2**31 - 1),
        }
        for name, low, high in _OPTIONAL_INTEGERS:
            if (value := getattr(self, name)) is not None:
                checked[name] = _integer(name, value, low, high)
        if self.max_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            checked["max_tokens"] = _integer("max_tokens", self.max_tokens, least, 2**31 - 1)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            checked[name] = _plain(getattr(self, name))
            if not isinstance(checked[name], bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        if len(stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got {stop!r}")
        stop_token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        checked["stop"] = stop
        checked["stop_token_ids"] = tuple(_integer("stop_token_ids", token, 0, 2**31 - 1) for token in stop_token_ids)
        checked["structured_outputs"] = StructuredOutputsParams.of(self.structured_outputs)
        if checked["structured_outputs"] is not None and checked["ignore_eos"]:
            raise RequestError("ignore_eos must be False with structured_outputs, got True")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

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

    def of_choice(self, number: int) -> Self:
        """For one of several outputs of a prompt, numbered from 0: with seeds of their own they differ."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % (MAX_SEED + 1))

    def max_output_tokens(self, num_room_tokens: int) -> int:
        """Output tokens to make at most where max_model_len leaves ``num_room_tokens``."""
        if self.max_tokens is None:
            return num_room_tokens
        return min(self.max_tokens, num_room_tokens) if isinstance(self.max_tokens, SoftLimit) else self.max_tokens


@dataclass(slots=True)
class RequestMetrics:
    """Times on the engine's clock, in seconds; None until they happen."""

    arrival_seconds: float
    first_scheduled_seconds: float | None = None
    token_seconds: list[float] = field(default_factory=list)
    """When each output token reached the host."""
    finished_seconds: float | None = None
    num_preemptions: int = 0
    num_stalls: int = 0
    """Steps that ran without this request while it was ready to decode: zero under a stall-free policy."""

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token: from arrival to the first output token."""
        return self.token_seconds[0] - self.arrival_seconds if self.token_seconds else None

    @property
    def tbt_seconds(self) -> list[float]:
        """Times between consecutive output tokens."""
        return [b - a for a, b in pairwise(self.token_seconds)]

    @property
    def scheduling_delay_seconds(self) -> float | None:
        """From arrival to the first batch that held a part of the prompt."""
        if self.first_scheduled_seconds is None:
            return None
        return self.first_scheduled_seconds - self.arrival_seconds


@dataclass(eq=False, slots=True)
class Request:
    """One request inside the engine.

    There is no prefill or decode phase: ``num_computed_tokens`` chases ``num_tokens``. A token that was sampled on the
    device but has not reached the host yet counts as one and is pending, so the scheduler can run one step ahead.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    """Best a tuple: what the garbage collector need not look into, while thousands of requests wait."""
    params: SamplingParams
    max_tokens: int
    """Output tokens to make at most, as of ``SamplingParams.max_output_tokens``; 0: only the prompt is scored."""
    metrics: RequestMetrics
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the output: the caller's, and the model's EOS unless ignore_eos."""
    seed: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    num_tokens: int = field(init=False)
    """Prompt and output tokens, those still pending on the device included."""
    num_unsampled_tokens: int = 0
    """Of a pipeline: the pending ones whose step has not left the last stage, so that not even the device has them."""
    num_computed_tokens: int = 0
    slot: int = -1
    """Row of the per-sequence device arrays while running, -1 otherwise."""
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens, without pending ones."""
        return self.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_known_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is not in the cache yet: 1 while decoding, more during prefill or after a preemption."""
        return self.num_tokens - self.num_computed_tokens

    def known_token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens ``[start, stop)`` as far as the host knows them: a pending one is missing at the end."""
        prompt = self.num_prompt_tokens
        known = list(self.prompt_token_ids[start:stop])
        if stop > prompt:
            known += self.output_token_ids[max(start - prompt, 0) : stop - prompt]
        return known

    @property
    def decoding(self) -> bool:
        """True when one token of work is left and it follows an output token."""
        return self.num_computed_tokens + 1 == self.num_tokens > self.num_prompt_tokens

    @property
    def exhausted(self) -> bool:
        """True when every token the request may make has been sampled, processed by the host or not.

        The prompt's last step samples one even where none is wanted.
        """
        return self.num_tokens - self.num_prompt_tokens >= max(self.max_tokens, 1)


class RequestDelta(NamedTuple):
    """What one engine step added to one request."""

    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[dict[int, Logprob]] | None
    """One dict per new token: token id -> Logprob; the chosen token comes first."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """Given once, with the first token or the end: an entry per prompt token, the first None."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop string or stop token id that ended the output; None for EOS and other endings."""
    metrics: RequestMetrics
    num_prompt_tokens: int

    def followed_by(self, later: RequestDelta) -> RequestDelta:
        """Both as one."""
        return later._replace(
            token_ids=[*self.token_ids, *later.token_ids],
            text=self.text + later.text,
            logprobs=None if self.logprobs is None else self.logprobs + (later.logprobs or []),
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
        )


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    """A finished request, in vLLM's shape."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


class Completion:
    """The output of one request, collected from its deltas. ``prompt`` is what is shown for the prompt, if anything."""

    def __init__(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> None:
        self.request_id, self.prompt_token_ids, self.params, self.prompt = request_id, prompt_token_ids, params, prompt
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.finish_reason: FinishReason | None = None
        self._texts: list[str] = []
        self._last: RequestDelta

    def add(self, delta: RequestDelta) -> None:
        """Append what a step has added."""
        self.token_ids += delta.token_ids
        self._texts.append(delta.text)
        if self.logprobs is not None and delta.logprobs is not None:
            self.logprobs += delta.logprobs
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self._last = delta.finish_reason, delta

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def output(self) -> RequestOutput:
        """Once the last delta has been added."""
        total = None
        if self.logprobs is not None:
            total = sum(entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=True))
        completion = CompletionOutput(
            index=0,
            text=self.text,
            token_ids=self.token_ids,
            cumulative_logprob=total,
            logprobs=self.logprobs,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self._last.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[completion],
            finished=True,
            metrics=self._last.metrics,
        )
