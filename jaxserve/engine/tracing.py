"""A timeline of the steps in Chrome's trace-event format, for Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from jaxserve.engine.metrics import StepRecord
from jaxserve.errors import ConfigError
from jaxserve.scheduler import Chunk

_HOST, _DEVICE, _SLOTS = 1, 2, 10

type TracedStep = tuple[StepRecord, list[Chunk]]
"""A step that has been processed: nothing changes it any more."""


def open_trace(path: str) -> BinaryIO:
    """A file to trace to; nothing of it waits in a buffer. Raises ConfigError."""
    try:
        return Path(path).open("wb", buffering=0)
    except OSError as error:
        raise ConfigError(f"trace: cannot write {path!r}: {error.strerror}") from error


def trace_of(steps: Iterable[TracedStep]) -> bytes:
    """A whole trace."""
    sink = io.BytesIO()
    tracer = StepTracer(sink)
    for record, chunks in steps:
        tracer.add(record, chunks)
    tracer.end()
    return sink.getvalue()


class StepTracer:
    """Writes events as they happen. The format allows a missing end, so a killed server leaves a readable file."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink, self._named_slots = sink, set[int]()
        self._events: list[bytes] = []
        sink.write(b"[\n")
        self._name_track(_HOST, "host")
        self._name_track(_DEVICE, "device")

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
                self._name_track(track, f"sequence slot {chunk.slot}")
            kind = "decode" if chunk.start >= chunk.request.num_prompt_tokens else "prefill"
            args = {"request": chunk.request.request_id, "start": chunk.start, "tokens": chunk.num_tokens}
            self._span(track, kind, step.device_start_seconds, step.ready_seconds, args)
        self._flush()

    def end(self) -> None:
        self._flush()
        end = {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "jaxserve"}}
        self._sink.write(orjson.dumps(end) + b"]\n")

    def close(self) -> None:
        """End it, and close its file."""
        self.end()
        self._sink.close()

    def _name_track(self, track: int, name: str) -> None:
        self._add({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}})

    def _span(self, track: int, name: str, start_seconds: float, end_seconds: float, args: dict | None = None) -> None:
        start_us, length_us = start_seconds * 1e6, (end_seconds - start_seconds) * 1e6
        self._add(
            {"name": name, "ph": "X", "pid": 1, "tid": track, "ts": start_us, "dur": length_us, "args": args or {}}
        )

    def _add(self, event: dict[str, Any]) -> None:
        self._events.append(orjson.dumps(event) + b",\n")

    def _flush(self) -> None:
        self._sink.write(b"".join(self._events))
        self._events.clear()
