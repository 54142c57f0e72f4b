"""Offline batches in OpenAI's batch format: one request a line in, one result a line out, resumable.

In: ``{"custom_id", "method": "POST", "url", "body"}``. Out, in the order in which requests finish:
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. A line that cannot be served gets a
result with an error and hurts no other line. To run such lines again, delete their results from the output.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxserve.engine.call_thread import CallThread
from jaxserve.engine.engine import Engine, clear
from jaxserve.errors import RequestError
from jaxserve.openai import ENDPOINTS, Endpoint, Response
from jaxserve.progress import progress_bar
from jaxserve.request import Completion
from jaxserve.result_file import BatchFileError, ResultFile, result_key
from jaxserve.served_model import ServedModel, any_of

LOOKAHEAD = 4
"""Requests in the engine per sequence that it can run: enough to keep it full, and the file may be of any size."""


@dataclass(frozen=True)
class BatchLine:
    """One line of the input: a request, unless ``error`` says what it lacks, such as a custom_id of its own."""

    id: str
    custom_id: str | None
    endpoint: Endpoint | None = None
    body: Any = None
    error: str | None = None


def open_source(path: Path) -> IO[bytes]:
    """The input file; ``-`` is standard input. What can be read only once, a pipe, is copied to a temporary file."""
    with contextlib.ExitStack() as stack:
        source: IO[bytes] = sys.stdin.buffer if str(path) == "-" else stack.enter_context(path.open("rb"))
        if source.seekable():
            stack.pop_all()
            return source
        return _copied(source)


def _copied(source: IO[bytes]) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115  (the caller's)
    shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def check_models(source: IO[bytes], served_model_names: Sequence[str]) -> None:
    """Raise BatchFileError if no request of the input could be served because all name another model."""
    model = None
    for line in read_lines(source):
        if line.error is None and (model := line.body.get("model")) in (None, *served_model_names):
            break
    else:
        if model is not None:
            raise BatchFileError(
                f"model must be {any_of(served_model_names)}, which is served here, but every request has another, "
                f"such as {model!r:.80}; --served-model-name gives the model a name"
            )
    source.seek(0)


def read_lines(source: IO[bytes]) -> Iterator[BatchLine]:
    """Every line but blank ones. A custom_id belongs to the first line that has it."""
    owners: dict[str, str] = {}
    for number, raw in enumerate(source, 1):
        if not raw.strip():
            continue
        line = _parse_line(f"batch_req_{number}", raw)
        if line.custom_id is not None:
            owner = owners.setdefault(line.custom_id, line.id)
            if owner != line.id:
                line = BatchLine(line.id, None, error=f"custom_id {line.custom_id!r} is already that of {owner}")
        yield line


def _parse_line(line_id: str, raw: bytes) -> BatchLine:
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return BatchLine(line_id, None, error=f"not JSON: {error}")
    if not isinstance(entry, dict):
        return BatchLine(line_id, None, error=f"a line must be a JSON object, got {entry!r:.80}")
    custom_id, url, body = entry.get("custom_id"), entry.get("url"), entry.get("body")
    endpoint = next((endpoint for endpoint in ENDPOINTS if endpoint.path == url), None)
    checks = {
        "custom_id": (isinstance(custom_id, str), "a string"),
        "method": (entry.get("method") == "POST", "'POST'"),
        "url": (endpoint is not None, " or ".join(endpoint.path for endpoint in ENDPOINTS)),
        "body": (isinstance(body, dict), "a JSON object"),
    }
    wrong = (f"{name} must be {what}, got {entry.get(name)!r:.80}" for name, (ok, what) in checks.items() if not ok)
    return BatchLine(line_id, custom_id if isinstance(custom_id, str) else None, endpoint, body, next(wrong, None))


@dataclass
class BatchSummary:
    """What one run did. Skipped are the lines that had a result before; tokens are those of requests that succeeded."""

    num_skipped: int = 0
    num_succeeded: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    elapsed_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_succeeded + self.num_errors} requests, {self.num_errors} errors, {self.num_skipped} skipped "
            f"in {self.elapsed_seconds:.1f} s: {self.num_prompt_tokens / self.elapsed_seconds:.1f} prompt tokens/s, "
            f"{self.num_output_tokens / self.elapsed_seconds:.1f} output tokens/s"
        )


@dataclass(eq=False)
class _Answer:
    """A line under way: its choices end one by one."""

    line: BatchLine
    response: Response
    num_unfinished: int


class BatchRun:
    """Gives every line of ``source`` that has no result in ``results`` one. ``run`` may be called once.

    ``served_model_names``: what requests may call the model, and, the first, what results call it; by default as the
    engine does.
    """

    def __init__(
        self,
        engine: Engine,
        source: IO[bytes],
        results: ResultFile,
        *,
        served_model_names: Sequence[str] = (),
        show_progress: bool = True,
    ) -> None:
        source = source if source.seekable() else _copied(source)
        self._engine, self._lines, self._results = engine, read_lines(source), results
        self._model = ServedModel.of(engine, served_model_names)
        self._in_flight: dict[str, tuple[Completion, _Answer]] = {}
        self._summary = BatchSummary()
        self._num_lines = sum(bool(raw.strip()) for raw in source)
        source.seek(0)
        self._show_progress = show_progress

    def run(self) -> BatchSummary:
        """Whatever stops it, the results of what has finished are on the disk and the engine is left empty."""
        start_seconds = time.monotonic()
        num_done, hidden = len(self._results.done), not self._show_progress
        with progress_bar("serving", self._num_lines, "request", initial=num_done, disable=hidden) as bar:
            CallThread().run(self._serve(), bar.update)
        self._summary.elapsed_seconds = time.monotonic() - start_seconds
        return self._summary

    def _serve(self) -> Generator[int]:
        """On the engine's thread; yields the number of new results after every line and every step."""
        max_in_flight = LOOKAHEAD * self._engine.config.max_num_seqs
        try:
            while True:
                while len(self._in_flight) < max_in_flight and (line := next(self._lines, None)):
                    yield self._start(line)
                if not self._in_flight:
                    break
                yield self._step()
        finally:
            clear(self._engine, self._in_flight)

    def _start(self, line: BatchLine) -> int:
        """Hand the line to the engine, unless it has a result already or its result is an error."""
        if result_key(line.id, line.custom_id) in self._results.done:
            self._summary.num_skipped += 1
            return 0
        try:
            if line.endpoint is None or line.error is not None:
                raise RequestError(line.error)
            ask = line.endpoint.parse(line.body, self._model)
            if ask.stream:
                raise RequestError("stream must be false in a batch, got true")
            completions = line.endpoint.completions(ask, line.id, self._model)
            for completion in completions:
                self._engine.validate(completion.prompt_token_ids, completion.params)
                self._engine.grammar_of(completion.params)
        except RequestError as error:
            self._results.append([_result(line, 400, body=None, error=str(error))])
            self._summary.num_errors += 1
            return 1
        answer = _Answer(line, line.endpoint.respond(ask, completions, line.id, self._model), len(completions))
        for completion in completions:
            self._engine.add_request(completion.request_id, completion.prompt_token_ids, completion.params)
            self._in_flight[completion.request_id] = completion, answer
        return 0

    def _step(self) -> int:
        finished = []
        for delta in self._engine.step():
            completion, answer = self._in_flight[delta.request_id]
            completion.add(delta)
            if delta.finish_reason is not None:
                del self._in_flight[delta.request_id]
                answer.num_unfinished -= 1
                if not answer.num_unfinished:
                    finished.append(self._finish(answer))
        if finished:
            self._results.append(finished)
        return len(finished)

    def _finish(self, answer: _Answer) -> dict[str, Any]:
        if errors := [one.error for one in answer.response.completions if one.error is not None]:
            self._summary.num_errors += 1
            return _result(answer.line, 400, body=None, error=errors[0])
        body = answer.response.whole()
        self._summary.num_succeeded += 1
        self._summary.num_prompt_tokens += answer.response.num_prompt_tokens
        self._summary.num_output_tokens += answer.response.num_output_tokens
        return _result(answer.line, 200, body, error=None)


def _result(line: BatchLine, status_code: int, body: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
    return {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {"status_code": status_code, "request_id": line.id, "body": body},
        "error": None if error is None else {"code": "invalid_request", "message": error},
    }
