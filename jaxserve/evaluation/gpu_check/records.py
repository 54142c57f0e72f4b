"""What stages find, one line of JSON each, safe on disk before the next one begins."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Recorder:
    """Appends the records of one stage to a file that others append to too."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._stage = stage

    def add(self, kind: str, **data: Any) -> None:
        """Returns once it is on disk. ``data`` holds no NaN and no infinity, which JSON lacks."""
        record = {"time": round(time.time(), 3), "stage": self._stage, "kind": kind, **data}
        line = json.dumps(record, allow_nan=False) + "\n"
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())  # at once, so that records of several processes do not mix
            os.fsync(file)
        finally:
            os.close(file)


def read_records(path: Path) -> list[Record]:
    """All whole ones: the machine may have been taken away within the last line."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
