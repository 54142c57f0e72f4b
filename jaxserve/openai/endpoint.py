"""What OpenAI's endpoints have in common: one way from a body to the engine, and one back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from jaxserve.errors import RequestError
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel, TokenLimit, any_of

if TYPE_CHECKING:
    from jaxserve.openai.response import Response
    from jaxserve.openai.tools import Tools

MAX_PROMPTS = 128
"""Of a body."""
SAMPLING = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs", "logprob_start_len"}
IGNORED = {
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
"""Body parameters that clients write and that no output depends on."""
NO_TOOLS: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
"""Body parameters of tools where there are none; see Endpoint.neutral."""


@dataclass(frozen=True)
class Ask:
    """What a body asks for."""

    prompts: Sequence[ParsedPrompt] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of SamplingParams, the fields that are given."""
    echo: bool = False
    """Whether a choice begins with its prompt."""
    tools: Tools | None = None
    """What the model may call instead of answering, if anything."""
    text_format: Mapping[str, Any] = field(default_factory=lambda: {"type": "text"})
    """Of the answer, as /v1/responses says it."""
    stream: bool = False
    include_usage: bool = False
    """Whether a last chunk tells the number of tokens; ``continuous_usage_stats``: every chunk those until then."""
    continuous_usage_stats: bool = False


class Endpoint(ABC):
    """One of OpenAI's ways to ask for the same: how its bodies say it, and how they are answered."""

    path: ClassVar[str]
    id_prefix: ClassVar[str]
    """Of its responses' names."""
    names_events: ClassVar[bool] = False
    """Whether the events of a stream have their types as names; those of the others end with ``[DONE]``."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]]
    """Body parameters that clients write although only these values can be served; null is always one."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Sampling parameters that neither a body nor the model gives."""

    def parse(self, body: Mapping[str, Any], model: ServedModel) -> Ask:
        """What the body of a request asks for. Raises RequestError, naming the field."""
        given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
        if "model" in given:
            model.check_name(given.pop("model"))
        for name, neutral in self.neutral.items():
            if (value := given.pop(name, neutral[0])) not in neutral:
                raise RequestError(f"{name} must be {any_of(neutral)}, got {value!r:.80}")
        ask = self._take(given, model)
        if unknown := sorted(given.keys() - SAMPLING):
            known = ", ".join(sorted(SAMPLING))
            raise RequestError(f"unknown parameter {unknown[0]!r} for {self.path}; known: {known}")
        return replace(ask, sampling={**given, **ask.sampling})

    def completions(
        self, ask: Ask, response_id: str, model: ServedModel, limit: TokenLimit | None = None
    ) -> list[Completion]:
        """The requests for the engine that an ask makes, still without outputs. ``limit``: see ServedModel.token_ids.

        Raises RequestError.
        """
        found: list[Completion] = []
        for index, prompt in enumerate(ask.prompts):
            token_ids = model.token_ids(prompt, limit, ask.sampling)
            params = model.sampling_params(ask.sampling, len(token_ids), self.defaults)
            found += Completion.choices(f"{response_id}-{index}", token_ids, params, prompt.text)
        return found

    @abstractmethod
    def _take(self, given: dict[str, Any], model: ServedModel) -> Ask:
        """Take all out of a body but sampling parameters, which are left by SamplingParams' names; those of the ask go
        before them."""

    @abstractmethod
    def respond(self, ask: Ask, completions: Sequence[Completion], response_id: str, model: ServedModel) -> Response:
        """What writes the response."""
