"""A timeline of the steps in Chrome's trace-event format, for Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.engine.metrics import StepRecord
from jaxserve.errors import ConfigError
from jaxserve.scheduler import Chunk

_HOST, _DEVICE, _SLOTS = 1, 2, 10


class StepTracer:
    """Writes events as they happen. The format allows a missing end, so a killed server leaves a readable file.

    Raises ConfigError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w")
        except OSError as error:
            raise ConfigError(f"trace: cannot write {str(path)!r}: {error.strerror}") from error
        self._file.write("[\n")
        for track, name in ((_HOST, "host"), (_DEVICE, "device")):
            self._write({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}})
        self._named_slots: set[int] = set()

    def add(self, step: StepRecord, chunks: list[Chunk]) -> None:
        """One step: the host's phases, the device's span, and a span for each sequence slot."""
        self._span(_HOST, "schedule", step.start_seconds, step.scheduled_seconds)
        self._span(_HOST, "launch", step.scheduled_seconds, step.launched_seconds)
        self._span(_HOST, "wait", step.waited_seconds, step.ready_seconds)
        self._span(_HOST, "process", step.ready_seconds, step.processed_seconds)
        args: dict[str, Any] = {"tokens": step.num_tokens, "decodes": step.num_decode_tokens, "rows": step.num_rows}
        self._span(_DEVICE, f"step {step.num_rows}", step.device_start_seconds, step.ready_seconds, args)
        for chunk in chunks:
            track = _SLOTS + chunk.slot
            if chunk.slot not in self._named_slots:
                self._named_slots.add(chunk.slot)
                name = {"name": f"sequence slot {chunk.slot}"}
                self._write({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": name})
            kind = "decode" if chunk.start >= chunk.request.num_prompt_tokens else "prefill"
            args = {"request": chunk.request.request_id, "start": chunk.start, "tokens": chunk.num_tokens}
            self._span(track, kind, step.device_start_seconds, step.ready_seconds, args)
        self._file.flush()

    def close(self) -> None:
        end = {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "jaxserve"}}
        self._file.write(json.dumps(end) + "]\n")
        self._file.close()

    def _span(self, track: int, name: str, start_seconds: float, end_seconds: float, args: dict | None = None) -> None:
        start_us, length_us = start_seconds * 1e6, (end_seconds - start_seconds) * 1e6
        self._write(
            {"name": name, "ph": "X", "pid": 1, "tid": track, "ts": start_us, "dur": length_us, "args": args or {}}
        )

    def _write(self, event: dict) -> None:
        self._file.write(json.dumps(event) + ",\n")
