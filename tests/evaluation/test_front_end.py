"""Whose CPU time is whose, and the table of the ways."""

from __future__ import annotations

import os
import threading
import time

import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.front_end import (
    IN_PROCESS,
    CpuSeconds,
    FrontEndConfig,
    Round,
    rows,
    server_cpu,
    thread_seconds,
)
from jaxserve.server.client import Client


def spin(seconds: float) -> None:
    started_seconds = time.thread_time()
    while time.thread_time() - started_seconds < seconds:
        pass


def test_threads_tell_their_cpu_time():
    spun, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (spin(0.2), spun.set(), ended.wait()))
    thread.start()
    spun.wait()
    time.sleep(0.05)  # until it waits, too
    times = thread_seconds(os.getpid())
    ended.set()
    thread.join()
    assert times[thread.native_id][1] >= 0.19


def test_the_main_thread_is_the_event_loops():
    before = {1: ("python", 1.0), 2: ("engine", 1.0)}
    after = {1: ("python", 1.5), 2: ("engine", 4.0), 3: ("python", 0.25), 4: ("xla", 9.0)}
    assert server_cpu(1, before, after) == CpuSeconds(engine=3.0, loop=0.5, rest=9.25)


def test_the_engines_thread_is_found_by_its_name(make_server):
    server = make_server()
    with Client(server.target) as client:
        list(client.generate("abc", max_tokens=3))
    assert "engine" in {name for name, _ in thread_seconds(os.getpid()).values()}


def test_rows_are_medians_beside_the_engine_alone():
    engine_alone = [Round(1.0, 1000, CpuSeconds(0.1, 0.0, 0.2))] * 3
    http = [Round(seconds, 1000, CpuSeconds(0.1, 0.05, 0.2)) for seconds in (2.0, 1.25, 10.0)]
    assert rows({IN_PROCESS: engine_alone, "HTTP": http}) == [
        {"way": "in process", "tokens/s": "1,000", "of in process": "100.0%", "engine us": "100", "loop us": "0",
         "rest us": "200"},
        {"way": "HTTP", "tokens/s": "500", "of in process": "50.0%", "engine us": "100", "loop us": "50",
         "rest us": "200"},
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["streams", "prompt_characters", "output_tokens", "rounds"])
def test_wrong_settings_are_named(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        FrontEndConfig(**{name: 0})
