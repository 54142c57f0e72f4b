"""How a server's process ends: a first signal drains, Ctrl-C after it ends at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def end_process(exit_code: int) -> NoReturn:
    """Without Python's clean-up: other threads may be inside XLA, which must not be torn down under them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def stop_signal(*, of_terminal: bool = True) -> asyncio.Event:
    """Set by SIGTERM and SIGINT. SIGINT after either ends the process; SIGTERM does not, which supervisors repeat.

    Call it inside the event loop. ``of_terminal``: not for a process whose parent takes SIGINT for both.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)

    def interrupt() -> None:
        if stopped.is_set():
            end_process(128 + signal.SIGINT)
        stopped.set()

    if of_terminal:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    return stopped


def drain_on_signal(drain: Callable[[], None]) -> None:
    """The same without an event loop: ``drain`` is called by the first signal. Call it in the main thread."""

    signalled = threading.Event()

    def handle(number: int, frame: object) -> None:
        if signalled.is_set() and number == signal.SIGINT:
            end_process(128 + signal.SIGINT)
        if not signalled.is_set():
            signalled.set()
            drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
