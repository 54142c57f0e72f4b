"""Lines served by an engine in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from jaxserve.batch.answer import Answer
from jaxserve.batch.lines import BatchLine
from jaxserve.engine.engine import Engine, clear
from jaxserve.engine.metrics import StepRecord
from jaxserve.errors import RequestError
from jaxserve.grammars import Grammar
from jaxserve.openai import Ask, Response
from jaxserve.request import Completion
from jaxserve.scheduler import Chunk
from jaxserve.served_model import ServedModel

LOOKAHEAD = 4
"""Requests in the engine per sequence that it can run: enough to keep it full, and the file may be of any size."""
PREPARED = 2
"""Lines that are prepared together per sequence that it can run, while the engine works on those before."""
WAKE_SECONDS = 0.1
"""How often an interrupt is looked for while there is nothing to do but wait."""


@dataclass(eq=False)
class _Asked:
    """A line that can be served; its choices end one by one."""

    line: BatchLine
    response: Response
    completions: list[Completion]
    grammar: Grammar | None
    num_unfinished: int

    def answer(self) -> Answer:
        if errors := [one.error for one in self.response.completions if one.error is not None]:
            return Answer.refusal(self.line, errors[0])
        return Answer(self.line, 200, self.response.whole())


FIRST: Mapping[str, Callable[[_Asked], Any] | None] = {
    "input": None,
    "prefix": lambda asked: asked.completions[0].prompt_token_ids,
}
"""Which of the lines that are prepared together go first."""


class EngineServer:
    """Prepares lines (chat template, tokens, checks, grammars) in a thread of its own, so that the engine never waits.

    ``served_model_names``: what requests may call the model, and, the first, what results call it; by default as the
    engine does. ``first``: one of ``FIRST``.
    """

    def __init__(self, engine: Engine, served_model_names: Sequence[str] = (), first: str = "input") -> None:
        self._engine, self._model = engine, ServedModel.of(engine, served_model_names)
        self._key = FIRST[first]
        self._num_steps = self._num_tokens = 0

    @property
    def budget_use(self) -> float | None:
        return self._num_tokens / (self._num_steps * self._engine.config.token_budget) if self._num_steps else None

    def answers(self, lines: Iterator[BatchLine]) -> Generator[list[Answer]]:
        """See BatchServer. On the engine's thread."""
        max_in_flight = LOOKAHEAD * self._engine.config.max_num_seqs
        ready, in_flight = deque[_Asked](), dict[str, tuple[Completion, _Asked]]()
        pool = ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._engine.on_step.append(self._observe)
        try:
            upcoming: Future[_Prepared] | None = pool.submit(self._prepare, lines)
            while upcoming is not None or ready or in_flight:
                answers = list[Answer]()
                if upcoming is not None and not ready and _has_come(upcoming, 0.0 if in_flight else WAKE_SECONDS):
                    prepared = upcoming.result()
                    upcoming = None if prepared.is_last else pool.submit(self._prepare, lines)
                    answers += prepared.refused
                    ready += prepared.asked
                while ready and len(in_flight) < max_in_flight:
                    self._start(ready.popleft(), in_flight)
                if in_flight:
                    answers += self._step(in_flight)
                yield answers
        finally:
            pool.shutdown(cancel_futures=True)
            clear(self._engine, in_flight)
            self._engine.on_step.remove(self._observe)

    def _prepare(self, lines: Iterator[BatchLine]) -> _Prepared:
        """The next lines, on the other thread; their texts become tokens together, which takes all cores."""
        asks, prepared = list[tuple[BatchLine, Ask]](), _Prepared([], [], is_last=True)
        for line in islice(lines, PREPARED * self._engine.config.max_num_seqs):
            prepared.is_last = False
            with prepared.refusing(line):
                asks.append((line, self._ask(line)))
        tokenized = iter(self._model.tokenized([prompt for _, ask in asks for prompt in ask.prompts]))
        for line, ask in asks:
            prompts = list(islice(tokenized, len(ask.prompts)))
            with prepared.refusing(line):
                prepared.asked.append(self._asked(line, replace(ask, prompts=prompts)))
        if self._key is not None:
            prepared.asked.sort(key=self._key)
        return prepared

    def _ask(self, line: BatchLine) -> Ask:
        if line.endpoint is None or line.error is not None:
            raise RequestError(line.error)
        ask = line.endpoint.parse(line.body, self._model)
        return replace(ask, prompts=[self._model.rendered(prompt) for prompt in ask.prompts])

    def _asked(self, line: BatchLine, ask: Ask) -> _Asked:
        assert line.endpoint is not None
        completions = line.endpoint.completions(ask, line.id, self._model)
        for completion in completions:
            self._engine.validate(completion.prompt_token_ids, completion.params)
        grammar = self._engine.grammar_of(completions[0].params)
        response = line.endpoint.respond(ask, completions, line.id, self._model)
        return _Asked(line, response, completions, grammar, len(completions))

    def _start(self, asked: _Asked, in_flight: dict[str, tuple[Completion, _Asked]]) -> None:
        for one in asked.completions:
            self._engine.add_request(one.request_id, one.prompt_token_ids, one.params, grammar=asked.grammar)
            in_flight[one.request_id] = one, asked

    def _step(self, in_flight: dict[str, tuple[Completion, _Asked]]) -> list[Answer]:
        answers = []
        for delta in self._engine.step():
            completion, asked = in_flight[delta.request_id]
            completion.add(delta)
            if delta.finish_reason is not None:
                del in_flight[delta.request_id]
                asked.num_unfinished -= 1
                if not asked.num_unfinished:
                    answers.append(asked.answer())
        return answers

    def _observe(self, step: StepRecord, chunks: list[Chunk]) -> None:
        self._num_steps += 1
        self._num_tokens += step.num_tokens


@dataclass(eq=False)
class _Prepared:
    """Lines that were read together."""

    asked: list[_Asked]
    refused: list[Answer]
    is_last: bool
    """Whether there were none any more."""

    @contextmanager
    def refusing(self, line: BatchLine) -> Iterator[None]:
        """Refuse the line where the block finds it wrong."""
        try:
            yield
        except RequestError as error:
            self.refused.append(Answer.refusal(line, str(error)))


def _has_come(future: Future[_Prepared], timeout_seconds: float) -> bool:
    return bool(wait([future], timeout_seconds).done)
