"""The output of an offline batch: written so that no result is lost or doubled, however a run ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from pathlib import Path
from typing import IO, Any, Self

logger = logging.getLogger(__name__)

_RESULT_START = b'{"id": "batch_req_'
_LINE_NUMBER = re.compile(re.escape(_RESULT_START) + rb'(\d+)"')


class BatchFileError(ValueError):
    """An input or output file that a batch cannot have."""


def result_key(line_id: str, custom_id: str | None) -> tuple[str, str]:
    """What a result is found by on restart: its custom_id, or its line's number if that line has none."""
    return ("line", line_id) if custom_id is None else ("custom_id", custom_id)


class ResultFile:
    """The output: appended to and synced, so a killed run loses what was in flight and nothing else.

    ``done`` holds the keys of the results that were there before; a torn last line is cut off. Raises BatchFileError,
    and leaves the file as it is, if it holds anything but results or another run writes to it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise BatchFileError(f"{path}: results must go to a file, which a restart can read")
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(path.open("a+b"))
            _lock(self._file, path)
            self.done = _recover(self._file, path)
            stack.pop_all()
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, results: list[dict[str, Any]]) -> None:
        """Write results; they are on the disk when this returns."""
        self._file.writelines(json.dumps(result).encode() + b"\n" for result in results)
        self._file.flush()
        os.fsync(self._file.fileno())

    def sort(self) -> None:
        """Put the results in the order of their lines. Whatever ends this, the file is whole, in either order."""
        self._file.seek(0)
        starts, numbers = [0], list[int]()
        for raw in self._file:
            starts.append(starts[-1] + len(raw))
            numbers.append(_line_number(raw))
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        if order == list(range(len(numbers))):
            return
        path = self._path.with_name(self._path.name + ".sorted")
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("w+b"))
            for index in order:
                self._file.seek(starts[index])
                file.write(self._file.read(starts[index + 1] - starts[index]))
            file.flush()
            os.fsync(file.fileno())
            _lock(file, path)
            path.replace(self._path)
            stack.pop_all()
        self._file.close()
        self._file = file

    def close(self) -> None:
        self._file.close()


def _line_number(raw: bytes) -> int:
    """Of the line that this is the result of; results that others have written come first."""
    match = _LINE_NUMBER.match(raw)
    return int(match[1]) if match else 0


def _lock(file: IO[bytes], path: Path) -> None:
    """For as long as the file is open."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BatchFileError(f"{path}: another run is writing to this file") from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): no other run may write to it", path, error.strerror)


def _recover(file: IO[bytes], path: Path) -> set[tuple[str, str]]:
    done, num_bytes = set(), 0
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
