"""The input of an offline batch: files of requests, plain, gzip or zstd, or a pipe."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Self

from jaxserve.batch.results import BatchFileError
from jaxserve.openai import ENDPOINTS, Endpoint
from jaxserve.served_model import any_of

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""What such files begin with."""


@dataclass(frozen=True)
class BatchLine:
    """One line of the input: a request, unless ``error`` says what it lacks, such as a custom_id of its own."""

    id: str
    custom_id: str | None
    endpoint: Endpoint | None = None
    body: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th line, the ``index``-th being the first: a share of the input for one of several machines."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``index/count``. Raises ValueError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError(f"shard must be i/N, from 0/N to N-1/N, got {text!r:.80}")
        return cls(int(match[1]), int(match[2]))

    def has(self, number: int) -> bool:
        """Whether it has the line of this number, counted from 1."""
        return (number - 1) % self.count == self.index


class BatchInput:
    """Files as if they were one, ``-`` being standard input; what can be read only once is copied to a temporary file.

    Lines may be iterated any number of times. A custom_id belongs to the first line that has it, in whichever shard.
    Raises OSError for what cannot be opened, and BatchFileError for what is compressed and cannot be read.
    """

    def __init__(self, paths: Sequence[Path], shard: Shard = Shard()) -> None:
        self._names, self._shard = [str(path) for path in paths], shard
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(_seekable(path)) for path in paths]
            self._opened = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def __len__(self) -> int:
        """Lines to serve. Reads all of the input."""
        return sum(1 for _ in self._raw_lines(only_shard=True))

    def __iter__(self) -> Iterator[BatchLine]:
        owners: dict[str, int] = {}
        for number, raw in self._raw_lines(only_shard=False):
            line = _parse_line(f"batch_req_{number}", raw)
            if line.custom_id is not None:
                owner = owners.setdefault(line.custom_id, number)
                if owner != number:
                    message = f"custom_id {line.custom_id!r} is already that of batch_req_{owner}"
                    line = BatchLine(line.id, None, error=message)
            if self._shard.has(number):
                yield line

    def check_models(self, served_model_names: Sequence[str]) -> None:
        """Raise BatchFileError if no request of the input could be served because all name another model."""
        model = None
        for line in self:
            if line.error is None and (model := line.body.get("model")) in (None, *served_model_names):
                return
        if model is not None:
            raise BatchFileError(
                f"model must be {any_of(served_model_names)}, which is served here, but every request has another, "
                f"such as {model!r:.80}; --served-model-name gives the model a name"
            )

    def _raw_lines(self, only_shard: bool) -> Iterator[tuple[int, bytes]]:
        """All lines but blank ones, with their numbers, which go on from one file to the next."""
        number = 0
        for name, file in zip(self._names, self._files, strict=True):
            for raw in _lines_of(name, file):
                number += 1
                if (not only_shard or self._shard.has(number)) and raw.strip():
                    yield number, raw


def _seekable(path: Path) -> IO[bytes]:
    with contextlib.ExitStack() as stack:
        source: IO[bytes] = sys.stdin.buffer if str(path) == "-" else stack.enter_context(path.open("rb"))
        if source.seekable():
            stack.pop_all()
            return source
        copy = tempfile.TemporaryFile()  # noqa: SIM115  (the caller's)
        shutil.copyfileobj(source, copy)
        return copy


def _lines_of(name: str, file: IO[bytes]) -> Iterator[bytes]:
    """A file's lines, from the beginning, decompressed."""
    file.seek(0)
    start = file.read(len(ZSTD))
    file.seek(0)
    reader: Iterable[bytes] = file
    faults: tuple[type[Exception], ...] = ()
    if start.startswith(GZIP):
        reader, faults = gzip.GzipFile(fileobj=file), (EOFError, zlib.error, gzip.BadGzipFile)
    elif start == ZSTD:
        zstd = _zstd(name)
        reader, faults = zstd.ZstdFile(file), (EOFError, zstd.ZstdError)
    try:
        for raw in reader:  # noqa: UP028  (it would close the file with this generator)
            yield raw
    except faults as error:
        raise BatchFileError(f"{name}: cannot be decompressed: {error}") from error


def _zstd(name: str) -> Any:
    """The module of Python 3.14, or its backport, which is an extra."""
    try:
        return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        raise BatchFileError(f"{name}: zstd needs the extra zstd: pip install 'jaxserve[zstd]'") from None


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
    wrong = [f"{name} must be {what}, got {entry.get(name)!r:.80}" for name, (ok, what) in checks.items() if not ok]
    if isinstance(body, dict) and body.get("stream") not in (None, False):
        wrong.append(f"stream must be false in a batch, got {json.dumps(body['stream']):.80}")
    fault = wrong[0] if wrong else None
    return BatchLine(line_id, custom_id if isinstance(custom_id, str) else None, endpoint, body, fault)
