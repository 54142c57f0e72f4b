"""Offline batches in OpenAI's batch format: one request a line in, one result a line out, resumable.

In: ``{"custom_id", "method": "POST", "url", "body"}``. Out, in the order in which requests finish:
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. A line that cannot be served gets a
result with an error and hurts no other line. To run such lines again, delete their results from the output.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from jaxserve.engine.engine import Engine
from jaxserve.request import Logprob, RequestDelta, RequestError, SamplingParams
from jaxserve.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LOOKAHEAD = 4
"""Requests in the engine per sequence that it can run: enough to keep it full, and the file may be of any size."""
SAMPLING = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs"}
NEUTRAL = {"n": 1, "stream": False, "frequency_penalty": 0, "presence_penalty": 0}
"""Body parameters that clients write although only this value can be served."""
_RESULT_START = b'{"id": "batch_req_'


class BatchFileError(ValueError):
    """An output file that no batch wrote."""


@dataclass(frozen=True)
class BatchLine:
    """One line of the input: a request, unless ``error`` says what it lacks, such as a custom_id of its own."""

    id: str
    custom_id: str | None
    url: Any = None
    body: Any = None
    error: str | None = None


def result_key(line_id: str, custom_id: str | None) -> tuple[str, str]:
    """What a result is found by on restart: its custom_id, or its line's number if that line has none."""
    return ("line", line_id) if custom_id is None else ("custom_id", custom_id)


def read_lines(source: BinaryIO) -> Iterator[BatchLine]:
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


def parse_body(line: BatchLine, engine: Engine) -> tuple[list[int], SamplingParams]:
    """The prompt's token ids and the sampling parameters of a request. Raises RequestError, naming the field.

    What the body leaves open has the model's defaults, then those of its endpoint, then those of SamplingParams.
    """
    model, defaults = engine.config.model, engine.sampling_defaults
    given = {name: value for name, value in line.body.items() if value is not None}
    if given.pop("model", model) != model:
        raise RequestError(f"model must be {model!r}, which is served here, got {line.body['model']!r:.80}")
    for name, neutral in NEUTRAL.items():
        if given.pop(name, neutral) != neutral:
            raise RequestError(f"{name} must be {neutral!r} in a batch, got {line.body[name]!r:.80}")
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    token_ids = _take_prompt(given, line.url, engine.tokenizer)
    if line.url == CHAT:
        defaults = {"max_tokens": None, **defaults}
        given = {"logprobs": _take_chat_logprobs(given)} | given
    if unknown := sorted(given.keys() - SAMPLING):
        raise RequestError(f"unknown parameter {unknown[0]!r} for {line.url}; known: {', '.join(sorted(SAMPLING))}")
    return token_ids, SamplingParams.with_defaults(given, defaults, engine.max_model_len - len(token_ids))


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


class ResultFile:
    """The output: appended to and synced, so a killed run loses what was in flight and nothing else.

    ``done`` holds the keys of the results that were there before; a torn last line is cut off. Raises BatchFileError,
    and leaves the file as it is, if it holds anything but results.
    """

    def __init__(self, path: Path) -> None:
        self.done = _recover(path)
        self._file = path.open("ab")

    def append(self, results: list[dict[str, Any]]) -> None:
        """Write results; they are on the disk when this returns."""
        self._file.writelines(json.dumps(result).encode() + b"\n" for result in results)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _recover(path: Path) -> set[tuple[str, str]]:
    done, num_bytes = set(), 0
    with path.open("a+b") as file:
        file.seek(0)
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n") and raw[: len(_RESULT_START)] == _RESULT_START[: len(raw)]:
                break
            try:
                result = json.loads(raw)
                done.add(result_key(result["id"], result["custom_id"]))
                num_bytes += len(raw)
            except (ValueError, TypeError, KeyError) as error:
                raise BatchFileError(f"{path}, line {number}: not a batch result: {raw[:80]!r}") from error
        file.truncate(num_bytes)
    return done


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


class BatchRun:
    """Gives every line of ``source`` that has no result in ``results`` one. ``run`` may be called once."""

    def __init__(self, engine: Engine, source: BinaryIO, results: ResultFile, *, show_progress: bool = True) -> None:
        self._engine, self._lines, self._results = engine, read_lines(source), results
        self._in_flight: dict[str, _Answer] = {}
        self._summary = BatchSummary()
        total = sum(bool(raw.strip()) for raw in source)
        source.seek(0)
        self._progress = tqdm(total=total, initial=len(results.done), unit="request", disable=not show_progress)

    def run(self) -> BatchSummary:
        """Whatever stops it, the results of what has finished are on the disk and the engine is left empty."""
        start_seconds = time.monotonic()
        max_in_flight = LOOKAHEAD * self._engine.config.max_num_seqs
        try:
            with self._progress:
                while True:
                    while len(self._in_flight) < max_in_flight and (line := next(self._lines, None)):
                        self._start(line)
                    if not self._in_flight:
                        break
                    self._step()
        finally:
            for request_id in self._in_flight:
                self._engine.abort(request_id)
            while self._engine.has_unfinished():
                self._engine.step()
        self._summary.elapsed_seconds = time.monotonic() - start_seconds
        return self._summary

    def _start(self, line: BatchLine) -> None:
        """Hand the line to the engine, unless it has a result already or its result is an error."""
        if result_key(line.id, line.custom_id) in self._results.done:
            self._summary.num_skipped += 1
            return
        try:
            if line.error is not None:
                raise RequestError(line.error)
            prompt, params = parse_body(line, self._engine)
            self._engine.add_request(line.id, prompt, params)
            self._in_flight[line.id] = _Answer(line, params.logprobs)
        except RequestError as error:
            self._summary.num_errors += 1
            self._finish([_result(line, 400, body=None, error=str(error))])

    def _step(self) -> None:
        finished = []
        for delta in self._engine.step():
            answer = self._in_flight[delta.request_id]
            answer.num_tokens += len(delta.token_ids)
            answer.text += delta.text
            answer.logprobs += delta.logprobs or []
            if delta.finish_reason is not None:
                del self._in_flight[delta.request_id]
                self._summary.num_succeeded += 1
                self._summary.num_prompt_tokens += delta.num_prompt_tokens
                self._summary.num_output_tokens += answer.num_tokens
                finished.append(_result(answer.line, 200, body=self._body(answer, delta), error=None))
        if finished:
            self._finish(finished)

    def _finish(self, results: list[dict[str, Any]]) -> None:
        self._results.append(results)
        self._progress.update(len(results))

    def _body(self, answer: _Answer, last: RequestDelta) -> dict[str, Any]:
        chat, prompt, output = answer.line.url == CHAT, last.num_prompt_tokens, answer.num_tokens
        text = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        logprobs = None if answer.num_top is None else _logprobs(answer, answer.num_top, self._engine.tokenizer)
        return {
            "id": answer.line.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._engine.config.model,
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
    """Log-probabilities as the request's endpoint gives them."""
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    content: list[dict[str, Any]] = []
    for position in answer.logprobs:
        tokens = [{"token": decode([i]), "logprob": entry.logprob} for i, entry in position.items()]
        # The first is the token that was chosen; it need not be among the likeliest.
        likeliest = sorted(tokens, key=itemgetter("logprob"), reverse=True)
        content.append({**tokens[0], "top_logprobs": likeliest[:num_top]})
    if answer.line.url == CHAT:
        return {"content": content}
    return {
        "tokens": [token["token"] for token in content],
        "token_logprobs": [token["logprob"] for token in content],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in content],
    }
