"""Hangs, and does not end when it is asked to: so that every check sees a stage being cut off."""

from __future__ import annotations

import os
import signal
import time

from jaxserve.evaluation.gpu_check.stage import Context


def run(context: Context) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    context.records.add("hanging", pid=os.getpid())
    while True:
        time.sleep(60)
