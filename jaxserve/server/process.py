"""scripts/serve.py as a child process, for programs that bring their own server."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

STOP_TIMEOUT_SECONDS = 60


class ServerProcessError(RuntimeError):
    """The server did not start or stop as it should."""


@contextmanager
def running_server(command: Sequence[str], *, timeout_seconds: float = 900.0) -> Iterator[str]:
    """Run ``command`` and give the address it serves on; SIGTERM and a clean exit at the end.

    Its output is shown until it serves; log and progress bar go to our stderr. A server that is still there after
    ``timeout_seconds`` hangs, and is killed. Raises ServerProcessError.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(timeout_seconds, process.kill)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield _wait_for_address(process)
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


def _wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        match = re.search(r"SERVING model=\S+ on (\S+)", line)
        if match:
            return match.group(1)
    raise ServerProcessError(f"the server ended with exit code {process.wait()} before it served")
