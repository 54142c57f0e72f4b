"""How a process ends by signals, played by small programs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

ASYNC = """
import asyncio
from jaxserve.server.signals import stop_signal
async def main():
    stopped = stop_signal()
    print("ready", flush=True)
    await stopped.wait()
    print("draining", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
WITHOUT_LOOP = """
import queue
from jaxserve.server.signals import drain_on_signal
drain_on_signal(lambda: print("draining", flush=True))
print("ready", flush=True)
queue.SimpleQueue().get()
"""


@pytest.mark.parametrize("program", [ASYNC, WITHOUT_LOOP])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ctrl_c_after_it_ends(program, first):
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGTERM)  # supervisors repeat it
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 128 + signal.SIGINT
        assert not process.stdout.read(), "drained once"
