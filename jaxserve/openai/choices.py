"""What ``/v1/chat/completions`` and ``/v1/completions`` have in common: responses of several choices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from jaxserve.errors import RequestError
from jaxserve.openai.endpoint import Ask, Endpoint
from jaxserve.openai.fields import rename_max_tokens, take_object, take_switch
from jaxserve.openai.formats import take_structured_outputs
from jaxserve.openai.response import Part, Response
from jaxserve.request import Completion, best_of
from jaxserve.served_model import ServedModel


class Choice(Protocol):
    """Writes one choice of a response, as a whole or part by part."""

    def whole(self, part: Part) -> dict[str, Any]: ...

    def chunk(self, part: Part) -> dict[str, Any] | None:
        """None where nothing is to be written yet."""


class ChoicesEndpoint(Endpoint):
    object: ClassVar[str]
    """What its responses call themselves."""
    chunk_object: ClassVar[str]
    """What the chunks of a streamed response call themselves."""
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "suffix": ("",),
        "modalities": (["text"],),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }

    def _take(self, given: dict[str, Any], model: ServedModel) -> Ask:
        rename_max_tokens(given, "max_completion_tokens")
        stream, options = take_switch(given, "stream"), take_object(given, "stream_options")
        usage, continuous = (take_switch(options, name) for name in ("include_usage", "continuous_usage_stats"))
        if stream and given.get("best_of", given.get("n", 1)) != given.get("n", 1):
            raise RequestError("stream must be false with a best_of over n, got true")
        structured = take_structured_outputs(given)
        return Ask(
            sampling={"structured_outputs": structured} if structured else {},
            stream=stream,
            include_usage=usage,
            continuous_usage_stats=continuous,
        )

    def respond(self, ask: Ask, completions: Sequence[Completion], response_id: str, model: ServedModel) -> Response:
        return ChoicesResponse(self, ask, completions, response_id, model)

    @abstractmethod
    def choice(self, index: int, completion: Completion, ask: Ask, model: ServedModel) -> Choice:
        """What writes the choice of this number."""


class ChoicesResponse(Response):
    def __init__(
        self,
        endpoint: ChoicesEndpoint,
        ask: Ask,
        completions: Sequence[Completion],
        response_id: str,
        model: ServedModel,
    ) -> None:
        super().__init__(ask, completions, response_id, model)
        self._endpoint = endpoint
        self._choices: dict[int, Choice] = {}
        """Those that have begun: until then their prompts may hold anything."""

    def last_events(self) -> Iterator[dict[str, Any]]:
        if self.ask.include_usage:
            yield {**self._head(self._endpoint.chunk_object, []), "usage": self._usage()}

    def _whole(self) -> dict[str, Any]:
        kept, n = list[Completion](), self.ask.sampling.get("n", 1)
        for first in range(0, len(self.completions), self.num_choices):
            kept += best_of(self.completions[first : first + self.num_choices], n)
        self.completions = kept
        choices = [self._choice(index).whole(completion) for index, completion in enumerate(kept)]
        return {**self._head(self._endpoint.object, choices), "usage": self._usage()}

    def _events(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        chunk = self._choice(index).chunk(part)
        if chunk is None:
            return
        head = self._head(self._endpoint.chunk_object, [chunk])
        if self.ask.continuous_usage_stats:
            head["usage"] = self._usage()
        elif self.ask.include_usage:
            head["usage"] = None
        yield head

    def _choice(self, index: int) -> Choice:
        if index not in self._choices:
            self._choices[index] = self._endpoint.choice(index, self.completions[index], self.ask, self.model)
        return self._choices[index]

    def _head(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.response_id, "object": name, "created": self.created, "model": self.model.names[0]}
        return {**head, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
