"""What OpenAI's endpoints have in common: one way from a body to the engine, and one back."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, FinishReason, Logprob, SamplingParams, as_integer
from jaxserve.served_model import ServedModel, TokenLimit, any_of

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

MAX_CHOICES = 128
"""Of a prompt; and most prompts of a body."""
SAMPLING = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs"}
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip
"""Body parameters that clients write and that no output depends on."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
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


@dataclass(frozen=True)
class Ask:
    """What a body asks for."""

    prompts: Sequence[ParsedPrompt]
    sampling: Mapping[str, Any]
    """Of SamplingParams, the fields that are given."""
    num_choices: int = 1
    """Of each prompt."""
    echo: bool = False
    """Whether a choice begins with its prompt."""
    stream: bool = False
    include_usage: bool = False
    """Whether a last chunk tells the number of tokens; ``continuous_usage_stats``: every chunk those until then."""
    continuous_usage_stats: bool = False


class Part(Protocol):
    """What a choice writes: all of a Completion, or what a RequestDelta adds to it."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None: ...
    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...


class Choice(Protocol):
    """Writes one choice of a response, as a whole or part by part."""

    def whole(self, part: Part) -> dict[str, Any]: ...

    def chunk(self, part: Part) -> dict[str, Any]: ...


class Endpoint(ABC):
    """One of OpenAI's two ways to ask for the same: how its bodies say it, and how they are answered."""

    path: ClassVar[str]
    object: ClassVar[str]
    """What its responses call themselves."""
    chunk_object: ClassVar[str]
    """What the chunks of a streamed response call themselves."""
    id_prefix: ClassVar[str]
    """Of its responses' names."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Sampling parameters that neither a body nor the model gives."""

    def parse(self, body: Mapping[str, Any], model: ServedModel) -> Ask:
        """What the body of a request asks for. Raises RequestError, naming the field."""
        given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        if "model" in given:
            model.check_name(given.pop("model"))
        for name, neutral in NEUTRAL.items():
            if (value := given.pop(name, neutral[0])) not in neutral:
                raise RequestError(f"{name} must be {any_of(neutral)}, got {value!r:.80}")
        if "max_completion_tokens" in given:
            given["max_tokens"] = given.pop("max_completion_tokens")
        num_choices = take_integer(given, "n", MAX_CHOICES)
        if (best_of := given.pop("best_of", num_choices)) != num_choices:
            raise RequestError(f"best_of must be n, {num_choices}, got {best_of!r:.80}")
        stream = take_switch(given, "stream")
        options = given.pop("stream_options", {})
        if not isinstance(options, Mapping):
            raise RequestError(f"stream_options must be an object, got {options!r:.80}")
        options = dict(options)
        usage, continuous = (take_switch(options, name) for name in ("include_usage", "continuous_usage_stats"))
        echo = take_switch(given, "echo")
        prompts = self._take_prompts(given, echo)
        if unknown := sorted(given.keys() - SAMPLING):
            known = ", ".join(sorted(SAMPLING))
            raise RequestError(f"unknown parameter {unknown[0]!r} for {self.path}; known: {known}")
        if echo and (given.get("logprobs") is not None or given.get("max_tokens") == 0):
            given["prompt_logprobs"] = given.get("logprobs", 0)
        return Ask(prompts, given, num_choices, echo, stream, usage, continuous)

    def completions(
        self, ask: Ask, response_id: str, model: ServedModel, limit: TokenLimit | None = None
    ) -> list[Completion]:
        """The requests for the engine that an ask makes, still without outputs. ``limit``: see ServedModel.token_ids.

        Raises RequestError.
        """
        found: list[Completion] = []
        for prompt in ask.prompts:
            token_ids = model.token_ids(prompt, limit)
            params = model.sampling_params(ask.sampling, len(token_ids), self.defaults)
            for number in range(ask.num_choices):
                name = f"{response_id}-{len(found)}"
                found.append(Completion(name, token_ids, params.of_choice(number), prompt.text))
        return found

    @abstractmethod
    def _take_prompts(self, given: dict[str, Any], echo: bool) -> Sequence[ParsedPrompt]:
        """Take the prompts out of a body, and leave sampling parameters by SamplingParams' names."""

    @abstractmethod
    def choice(self, index: int, completion: Completion, echo: bool, tokenizer: Tokenizer) -> Choice:
        """What writes the choice of this number."""


@dataclass
class Response:
    """The bodies that answer an ask: one at the end, or chunks."""

    endpoint: Endpoint
    ask: Ask
    completions: Sequence[Completion]
    response_id: str
    model: ServedModel
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._choices: dict[int, Choice] = {}
        """Those that have begun: until then their prompts may hold anything."""
        self._num_output_tokens = 0

    def whole(self) -> dict[str, Any]:
        """Once all completions have ended."""
        choices = [self._choice(index).whole(completion) for index, completion in enumerate(self.completions)]
        self._num_output_tokens = sum(len(completion.token_ids) for completion in self.completions)
        return {**self._head(self.endpoint.object, choices), "usage": self._usage()}

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        """What ``part`` adds to the choice of this number."""
        self._num_output_tokens += len(part.token_ids)
        head = self._head(self.endpoint.chunk_object, [self._choice(index).chunk(part)])
        if self.ask.continuous_usage_stats:
            return {**head, "usage": self._usage()}
        return {**head, "usage": None} if self.ask.include_usage else head

    def last_chunk(self) -> dict[str, Any] | None:
        """What comes after all choices have ended, if anything."""
        if not self.ask.include_usage:
            return None
        return {**self._head(self.endpoint.chunk_object, []), "usage": self._usage()}

    def _choice(self, index: int) -> Choice:
        if index not in self._choices:
            completion, echo = self.completions[index], self.ask.echo
            self._choices[index] = self.endpoint.choice(index, completion, echo, self.model.tokenizer)
        return self._choices[index]

    def _head(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.response_id, "object": name, "created": self.created, "model": self.model.names[0]}
        return {**head, "choices": choices}

    def _usage(self) -> dict[str, int]:
        # Each prompt once, however many choices it has.
        prompts = self.completions[:: self.ask.num_choices]
        num_prompt_tokens = sum(len(completion.prompt_token_ids) for completion in prompts)
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": num_prompt_tokens + self._num_output_tokens,
        }


def take_switch(given: dict[str, Any], name: str) -> bool:
    """Take what is true or false out of a body; false by default."""
    value = given.pop(name, None)
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} must be true or false, got {value!r:.80}")
    return bool(value)


def take_integer(given: dict[str, Any], name: str, limit: int) -> int:
    """Take a number from 1 up out of a body; 1 by default."""
    value = given.pop(name, 1)
    try:
        number = as_integer(value)
    except TypeError:
        number = 0
    if not 1 <= number <= limit:
        raise RequestError(f"{name} must be an integer in [1, {limit}], got {value!r:.80}")
    return number
