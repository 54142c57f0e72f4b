"""scripts/serve.py as a child process, for programs that bring their own server."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

STOP_TIMEOUT_SECONDS = 60


class ServerProcessError(RuntimeError):
    """The server did not start or stop as it should."""


@dataclass(frozen=True)
class ServerProcess:
    """Where a server is reached, and its process."""

    address: str
    """Of gRPC."""
    url: str | None
    """Of the HTTP door, where it has one."""
    pid: int


@contextmanager
def running_server(command: Sequence[str], *, timeout_seconds: float = 900.0) -> Iterator[str]:
    """As ``running_process``, for its gRPC address alone."""
    with running_process(command, timeout_seconds=timeout_seconds) as server:
        yield server.address


@contextmanager
def running_process(command: Sequence[str], *, timeout_seconds: float = 900.0) -> Iterator[ServerProcess]:
    """Run ``command`` and tell where it serves; SIGTERM and a clean exit at the end.

    Its output is shown until it serves; log and progress bar go to our stderr. A server that is still there after
    ``timeout_seconds`` hangs, and is killed. Raises ServerProcessError.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(timeout_seconds, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield _wait_until_served(process)
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(timeout=STOP_TIMEOUT_SECONDS)
        if exit_code != 0:
            raise ServerProcessError(f"the server ended with exit code {exit_code} after SIGTERM")
    except subprocess.TimeoutExpired:
        raise ServerProcessError(f"the server did not end within {STOP_TIMEOUT_SECONDS} s of SIGTERM") from None
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def _wait_until_served(process: subprocess.Popen[str]) -> ServerProcess:
    assert process.stdout is not None
    url = None
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.search(r"OpenAI's API at (\S+)/v1", line):
            url = match.group(1)
        if match := re.search(r"SERVING model=\S+ on (\S+)", line):
            return ServerProcess(match.group(1), url, process.pid)
    raise ServerProcessError(f"the server ended with exit code {process.wait()} before it served")
