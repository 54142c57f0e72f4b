"""Runs stages one after the other, each in a process group of its own, whatever becomes of those before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from jaxserve.evaluation.gpu_check.records import Recorder
from jaxserve.evaluation.gpu_check.stage import ROOT, Stage

RESULTS, LOG = "results.jsonl", "log"
TERM_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""
LAST_SECONDS = 10.0
"""Of the budget, kept for the last stage, which gathers what others left."""
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
"""Of XLA_FLAGS: everything is launched by itself."""


def run_stages(stages: Sequence[Stage], out: Path, budget_seconds: float, *, tiny: bool = False) -> bool:
    """Whether all stages that were begun passed. Those for which the budget has no time left are skipped and recorded.

    A stage may take what the budget has left, up to its limit, so that what runs late is cut short first.
    """
    deadline = time.monotonic() + budget_seconds
    graphs, passed = True, True
    with (out / LOG).open("ab", buffering=0) as log:
        for stage in stages:
            kept = 0.0 if stage is stages[-1] else LAST_SECONDS
            seconds = min(stage.limit_seconds, deadline - time.monotonic() - kept)
            records = Recorder(out / RESULTS, stage.name)
            if seconds < stage.least_seconds:
                records.add("stage", status="skipped", left_seconds=round(max(0.0, seconds), 1))
                print(f"{stage.name:12} skipped: {stage.least_seconds:g} s needed, {max(0.0, seconds):.0f} left")
                continue
            status, took = _run(stage, out, seconds, log, graphs=graphs, tiny=tiny)
            records.add("stage", status=status, seconds=round(took, 1), limit_seconds=round(seconds, 1), graphs=graphs)
            print(f"{stage.name:12} {status}, {took:.1f} s", flush=True)
            right = status == ("timed out" if stage.hangs else "passed")
            passed &= right
            graphs &= right or not stage.needs_graphs
    return passed


def _run(stage: Stage, out: Path, seconds: float, log: IO[bytes], *, graphs: bool, tiny: bool) -> tuple[str, float]:
    """How it ended and how many seconds that took."""
    command = [
        sys.executable, "-m", "jaxserve.evaluation.gpu_check.worker", stage.name, stage.module, *stage.arguments,
        "--out", str(out), "--seconds", str(seconds), *(["--tiny"] if tiny else []),
    ]  # fmt: skip
    log.write(f"=== {stage.name}\n".encode())
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
        env=_environment(stage.environment, graphs=graphs),
    )  # fmt: skip
    try:
        status = "passed" if process.wait(seconds) == 0 else f"failed with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        status = "timed out"
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERM_SECONDS)
    finally:
        _signal(process, signal.SIGKILL)  # also what it started and left
        process.wait()
    return status, time.monotonic() - start


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, number)


def _environment(extra: Mapping[str, str], *, graphs: bool) -> dict[str, str]:
    flags = [os.environ.get("XLA_FLAGS", ""), extra.get("XLA_FLAGS", ""), "" if graphs else NO_GRAPHS]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **extra, "XLA_FLAGS": " ".join(filter(None, flags)), "PYTHONPATH": path}
