"""The bodies that answer what was asked for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxserve.openai.endpoint import Ask
from jaxserve.request import Completion, FinishReason, Logprob, RequestMetrics
from jaxserve.served_model import ServedModel


class Part(Protocol):
    """What is written of a completion: all of it, or what a RequestDelta adds."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[Mapping[int, Logprob]] | None: ...
    @property
    def prompt_logprobs(self) -> list[Mapping[int, Logprob] | None] | None: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def metrics(self) -> RequestMetrics: ...


class Response(ABC):
    """One response: as a whole once all completions have ended, or in the events of a stream."""

    def __init__(self, ask: Ask, completions: Sequence[Completion], response_id: str, model: ServedModel) -> None:
        self.ask, self.completions, self.response_id, self.model = ask, completions, response_id, model
        self.created = int(time.time())
        self.num_choices = len(completions) // len(ask.prompts)
        """Made of each prompt."""
        self.num_prompt_tokens = sum(
            len(completion.prompt_token_ids) for completion in completions[:: self.num_choices]
        )
        """Each prompt's once, however many choices it has."""
        self.num_output_tokens = 0
        """Those that have been made, or written."""
        self._num_cached_tokens: dict[int, int] = {}

    def whole(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        for index, completion in enumerate(self.completions):
            self._count(index, completion)
        return self._whole()

    def events(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """What ``part`` adds to the completion of this number."""
        self._count(index, part)
        return self._events(index, part)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts, what need not be computed."""
        return sum(self._num_cached_tokens.values())

    def _count(self, index: int, part: Part) -> None:
        self.num_output_tokens += len(part.token_ids)
        if index % self.num_choices == 0:  # the other choices of a prompt find what this one has computed
            self._num_cached_tokens[index] = part.metrics.num_cached_tokens

    def first_events(self) -> Iterator[dict[str, Any]]:
        """What goes before all parts."""
        return iter(())

    @abstractmethod
    def last_events(self) -> Iterator[dict[str, Any]]:
        """What comes after all completions have ended."""

    @abstractmethod
    def _whole(self) -> dict[str, Any]: ...

    @abstractmethod
    def _events(self, index: int, part: Part) -> Iterator[dict[str, Any]]: ...
