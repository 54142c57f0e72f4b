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
from dataclasses import dataclass, field, fields
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from jaxserve.engine.call_thread import CallThread
from jaxserve.engine.engine import Engine, clear
from jaxserve.errors import RequestError
from jaxserve.progress import progress_bar
from jaxserve.request import Logprob, RequestDelta, SamplingParams
from jaxserve.result_file import BatchFileError, ResultFile, result_key
from jaxserve.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LOOKAHEAD = 4
"""Requests in the engine per sequence that it can run: enough to keep it full, and the file may be of any size."""
SAMPLING = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs"}
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "stream_options", "user",
}  # fmt: skip
"""Body parameters that clients write and that no output depends on."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
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
class BatchLine:
    """One line of the input: a request, unless ``error`` says what it lacks, such as a custom_id of its own."""

    id: str
    custom_id: str | None
    url: Any = None
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
                f"model must be {_any_of(served_model_names)}, which is served here, but every request has another, "
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
    checks = {
        "custom_id": (isinstance(custom_id, str), "a string"),
        "method": (entry.get("method") == "POST", "'POST'"),
        "url": (url in (CHAT, COMPLETIONS), f"{CHAT} or {COMPLETIONS}"),
        "body": (isinstance(body, dict), "a JSON object"),
    }
    wrong = (f"{name} must be {what}, got {entry.get(name)!r:.80}" for name, (ok, what) in checks.items() if not ok)
    return BatchLine(line_id, custom_id if isinstance(custom_id, str) else None, url, body, next(wrong, None))


def parse_body(
    line: BatchLine, engine: Engine, served_model_names: Sequence[str] = ()
) -> tuple[list[int], SamplingParams]:
    """The prompt's token ids and the sampling parameters of a request. Raises RequestError, naming the field.

    What the body leaves open has the model's defaults, then those of its endpoint, then those of SamplingParams.
    ``served_model_names``: what bodies may call the model; by default as the engine does.
    """
    names, defaults = served_model_names or (engine.config.model,), engine.sampling_defaults
    given = {name: value for name, value in line.body.items() if value is not None and name not in IGNORED}
    if (model := given.pop("model", names[0])) not in names:
        raise RequestError(f"model must be {_any_of(names)}, which is served here, got {model!r:.80}")
    for name, neutral in NEUTRAL.items():
        if (value := given.pop(name, neutral[0])) not in neutral:
            raise RequestError(f"{name} must be {_any_of(neutral)} in a batch, got {value!r:.80}")
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    token_ids = _take_prompt(given, line.url, engine.tokenizer)
    if line.url == CHAT:
        defaults = {"max_tokens": None, **defaults}
        given = {"logprobs": _take_chat_logprobs(given)} | given
    if unknown := sorted(given.keys() - SAMPLING):
        raise RequestError(f"unknown parameter {unknown[0]!r} for {line.url}; known: {', '.join(sorted(SAMPLING))}")
    return token_ids, SamplingParams.with_defaults(given, defaults, engine.max_model_len - len(token_ids))


def _any_of(values: Sequence[Any]) -> str:
    return " or ".join(map(repr, values))


def _take_prompt(given: dict[str, Any], url: str, tokenizer: Tokenizer) -> list[int]:
    if url == CHAT:
        # The template writes the special tokens itself.
        return tokenizer.encode(tokenizer.apply_chat_template(given.pop("messages", None)), add_special_tokens=False)
    prompt = given.pop("prompt", None)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(type(token_id) is int for token_id in prompt):
        return prompt
    raise RequestError(f"prompt must be a string or a list of token ids, got {prompt!r:.80}")


def _take_chat_logprobs(given: dict[str, Any]) -> int | None:
    """Chats ask for log-probabilities with a switch and a number; take both out of ``given``."""
    wanted, num_top = given.pop("logprobs", False), given.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise RequestError(f"logprobs must be true or false for {CHAT}, got {wanted!r:.80}")
    if num_top is not None and not wanted:
        raise RequestError(f"top_logprobs needs logprobs to be true, got {num_top!r:.80} without")
    return (num_top or 0) if wanted else None


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


@dataclass
class _Answer:
    """The output of one request as it grows; ``num_top`` alternatives per token are wanted, None: no logprobs."""

    line: BatchLine
    num_top: int | None
    num_tokens: int = 0
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_token_ids: Sequence[int] = ()
    skip_special_tokens: bool = True


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
        self._model_names = served_model_names or (engine.config.model,)
        self._in_flight: dict[str, _Answer] = {}
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
            if line.error is not None:
                raise RequestError(line.error)
            prompt, params = parse_body(line, self._engine, self._model_names)
            self._engine.add_request(line.id, prompt, params)
        except RequestError as error:
            self._results.append([_result(line, 400, body=None, error=str(error))])
            self._summary.num_errors += 1
            return 1
        self._in_flight[line.id] = _Answer(
            line, params.logprobs, prompt_token_ids=prompt, skip_special_tokens=params.skip_special_tokens
        )
        return 0

    def _step(self) -> int:
        finished = []
        for delta in self._engine.step():
            answer = self._in_flight[delta.request_id]
            answer.num_tokens += len(delta.token_ids)
            answer.text += delta.text
            answer.logprobs += delta.logprobs or []
            if delta.finish_reason is not None:
                del self._in_flight[delta.request_id]
                finished.append(_result(answer.line, 200, self._body(answer, delta), error=None))
                self._summary.num_succeeded += 1
                self._summary.num_prompt_tokens += delta.num_prompt_tokens
                self._summary.num_output_tokens += answer.num_tokens
        if finished:
            self._results.append(finished)
        return len(finished)

    def _body(self, answer: _Answer, last: RequestDelta) -> dict[str, Any]:
        chat, prompt, output = answer.line.url == CHAT, last.num_prompt_tokens, answer.num_tokens
        text = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        logprobs = None if answer.num_top is None else _logprobs(answer, answer.num_top, self._engine.tokenizer)
        return {
            "id": answer.line.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._model_names[0],
            "choices": [{"index": 0, **text, "logprobs": logprobs, "finish_reason": last.finish_reason}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output},
        }


def _result(line: BatchLine, status_code: int, body: dict[str, Any] | None, error: str | None) -> dict[str, Any]:
    return {
        "id": line.id,
        "custom_id": line.custom_id,
        "response": {"status_code": status_code, "request_id": line.id, "body": body},
        "error": None if error is None else {"code": "invalid_request", "message": error},
    }


def _logprobs(answer: _Answer, num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Log-probabilities as the request's endpoint gives them. The first entry of a position is the chosen token."""
    if answer.line.url == CHAT:
        return {"content": [_chat_position(position, num_top, tokenizer) for position in answer.logprobs]}
    chosen = [next(iter(position)) for position in answer.logprobs]
    return {
        "tokens": [_completion_token(tokenizer.token_bytes(token_id)) for token_id in chosen],
        "token_logprobs": [next(iter(position.values())).logprob for position in answer.logprobs],
        "top_logprobs": [_completion_position(position, tokenizer) for position in answer.logprobs],
        "text_offset": _offsets(answer, chosen, tokenizer),
    }


def _chat_position(position: dict[int, Logprob], num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = []
    for token_id, entry in position.items():
        raw = tokenizer.token_bytes(token_id)
        tokens.append({"token": raw.decode(errors="backslashreplace"), "logprob": entry.logprob, "bytes": list(raw)})
    # The chosen token need not be among the likeliest.
    likeliest = sorted(tokens, key=itemgetter("logprob"), reverse=True)
    return {**tokens[0], "top_logprobs": likeliest[:num_top]}


def _completion_position(position: dict[int, Logprob], tokenizer: Tokenizer) -> dict[str, float]:
    """By text, the likeliest first, always with the chosen token; where several tokens have a text, the likeliest."""
    by_text: dict[str, float] = {}
    for token_id, entry in sorted(position.items(), key=lambda item: item[1].logprob, reverse=True):
        by_text.setdefault(_completion_token(tokenizer.token_bytes(token_id)), entry.logprob)
    return by_text


def _completion_token(raw: bytes) -> str:
    """A token as OpenAI's completions write it: parts of characters by their bytes, or they would all look alike."""
    text = raw.decode(errors="backslashreplace")
    return text if text.encode() == raw else f"bytes:{text}"


def _offsets(answer: _Answer, token_ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Where in the answer's text each token's begins; for the later parts of a character, where the character does."""
    stream = tokenizer.decode_stream(answer.skip_special_tokens, answer.prompt_token_ids)
    offsets, offset = [], 0
    for token_id in token_ids:
        offsets.append(min(offset, len(answer.text)))  # a stop string is left out of the text
        offset += len(stream.step(token_id))
    return offsets
