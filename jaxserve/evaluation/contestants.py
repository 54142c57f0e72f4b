"""Programs that are compared: jaxserve and its peers, each a process in an environment of its own.

What they are told and what they answer is in scripts/peers/contestant.py.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jaxserve.errors import ConfigError
from jaxserve.evaluation.latency import RunResult
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.request import RequestMetrics

STDERR_LINES = 15
"""How much of what a contestant said last goes into the message of its failure."""
END_SECONDS = 10.0
"""How long a contestant whose input has ended may take to leave."""


class ContestantError(RuntimeError):
    """A contestant died, hung or answered nonsense; the message has the end of its stderr."""


@dataclass(frozen=True)
class Program:
    """One of those that scripts/peers has a script for."""

    dtypes: tuple[str, ...]
    """Of weights and activations; the first is the default."""
    takes_arrivals: bool = True
    """Requests may come while others run."""
    reads_gguf_only: bool = False
    is_peer: bool = True
    """Whether it has an environment of its own."""


PROGRAMS = {
    "jaxserve": Program(("float32", "bfloat16"), is_peer=False),
    "vllm": Program(("float32", "bfloat16")),
    "openvino": Program(("file",), reads_gguf_only=True),
    "llama_cpp": Program(("file",), reads_gguf_only=True),
    "transformers": Program(("float32",), takes_arrivals=False),
    "one_by_one": Program(("float32",), takes_arrivals=False, is_peer=False),
}
"""dtype ``file``: the file's own quantised weights, in whatever type the program multiplies them."""


@dataclass(frozen=True)
class Contestant:
    """A program and the dtype it runs in, as ``vllm:bfloat16``."""

    program: str
    dtype: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``program`` or ``program:dtype``. Raises ConfigError."""
        program, _, dtype = text.partition(":")
        if program not in PROGRAMS:
            raise ConfigError(f"contestants must be of {', '.join(PROGRAMS)}, got {program!r}")
        dtypes = PROGRAMS[program].dtypes
        if (dtype or dtypes[0]) not in dtypes:
            raise ConfigError(f"dtype of {program} must be one of {', '.join(dtypes)}, got {dtype!r}")
        return cls(program, dtype or dtypes[0])

    def __str__(self) -> str:
        return f"{self.program}:{self.dtype}"

    def command(self, scripts: Path, environments: Path) -> list[str] | None:
        """What runs it, short of its settings; None where `make peers` did not finish its environment."""
        python, environment = sys.executable, environments / self.program
        if PROGRAMS[self.program].is_peer:
            if not (environment / ".installed").exists():
                return None
            python = str(environment / "bin" / "python")
        return [python, str(scripts / f"run_{self.program}.py")]


@dataclass(frozen=True)
class Round:
    """A contestant's answer: times on its clock, and what it generated, request by request."""

    run: RunResult
    token_ids: Sequence[Sequence[int]]

    @property
    def output_tokens_per_second(self) -> float:
        return self.run.num_output_tokens / self.run.seconds


class ContestantProcess:
    """A contestant, which loads its model while the caller goes on."""

    def __init__(self, command: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self, timeout_seconds: float) -> dict[str, str]:
        """The versions of the packages that matter, once the model is loaded. Raises ContestantError."""
        return self._answer("ready", timeout_seconds)

    def run(
        self, workload: Sequence[WorkloadRequest], prompts: Sequence[Sequence[int]], timeout_seconds: float
    ) -> Round:
        """Greedy outputs of forced lengths for all requests. Raises ContestantError."""
        requests = [
            {
                "arrival_seconds": request.arrival_seconds,
                "prompt_token_ids": list(prompt),
                "num_output_tokens": request.num_output_tokens,
            }
            for request, prompt in zip(workload, prompts, strict=True)
        ]
        assert self._process.stdin is not None
        try:
            print(json.dumps({"requests": requests}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure("died") from None
        done = self._answer("requests", timeout_seconds)
        for request, asked in zip(done, workload, strict=True):
            if len(request["token_ids"]) != asked.num_output_tokens:
                made = len(request["token_ids"])
                raise self._failure(f"made {made} tokens of {asked.num_output_tokens}")
        metrics = [RequestMetrics(r["arrival_seconds"], token_seconds=r["token_seconds"]) for r in done]
        first, last = min(m.arrival_seconds for m in metrics), max(m.token_seconds[-1] for m in metrics)
        result = RunResult(
            requests=metrics,
            seconds=last - first,
            num_prompt_tokens=sum(map(len, prompts)),
            num_output_tokens=sum(request.num_output_tokens for request in workload),
        )
        return Round(result, [request["token_ids"] for request in done])

    def close(self) -> None:
        """End the process, by force if need be."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(END_SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def _answer(self, key: str, timeout_seconds: float) -> Any:
        try:
            line = self._lines.get(timeout=timeout_seconds)
        except queue.Empty:
            raise self._failure(f"gave no answer within {timeout_seconds:g} s") from None
        if not line:
            raise self._failure(f"died with exit code {self._process.wait()}")
        try:
            return json.loads(line)[key]
        except (ValueError, KeyError):
            raise self._failure(f"answered {line.strip()[:200]!r}, expected JSON with {key!r}") from None

    def _failure(self, what: str) -> ContestantError:
        self._process.kill()  # and with it whatever else it would write, at an offset that is shared with this process
        self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().strip().splitlines()[-STDERR_LINES:]
        return ContestantError("\n    ".join([what, *said]))
