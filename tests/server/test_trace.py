"""A trace of the next steps, while the engine works or idles."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.server.client import Client
from jaxserve.server.http import trace
from tests.server.conftest import RunningServer
from tests.server.test_http import error_of, send


@pytest.fixture
def server(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(http_port=0, num_engines=2)


def device_steps(events: list[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in events if event["name"].startswith("step ")]


def test_the_next_steps_of_one_engine(server: RunningServer) -> None:
    with Client(server.target) as client:
        stream = client.generate("abc", max_tokens=None)
        next(iter(stream))
        busy = next(number for number, engine in enumerate(server.engines) if engine.running)
        first, second = (device_steps(send(server, "GET", f"/debug/trace?steps=3&engine={busy}")[2]) for _ in range(2))
        stream.cancel()
    numbers = [int(name.split()[1]) for name in first + second]
    assert len(numbers) == 6
    assert numbers == sorted(set(numbers))
    assert server.engines[busy].on_step == []


def test_an_idle_engine_gives_what_there_is(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "WAIT_SECONDS", 0.05)
    status, headers, events = send(server, "GET", "/debug/trace")
    assert (status, headers["content-type"], device_steps(events)) == (200, "application/json", [])
    assert server.engine.on_step == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("steps=0", "steps must be an integer in [1, 512], got '0'"),
        ("steps=513", "steps must be an integer in [1, 512], got '513'"),
        ("steps=all", "steps must be an integer in [1, 512], got 'all'"),
        ("engine=2", "engine must be an integer in [0, 1], got '2'"),
    ],
)
def test_what_cannot_be_traced_is_refused(server: RunningServer, query: str, message: str) -> None:
    assert error_of(send(server, "GET", f"/debug/trace?{query}"), 400) == message


def test_a_real_engine_shows_its_requests(llm: LLM) -> None:
    observers = llm.engine.on_step

    async def traced() -> bytes:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        working = threading.Thread(target=llm.generate, args=([[9] * 40], params), kwargs={"use_tqdm": False})
        asyncio.get_running_loop().call_soon(working.start)
        text = await trace.trace_next_steps(llm.engine, 3)
        await asyncio.to_thread(working.join)
        return text

    events = json.loads(asyncio.run(traced()))
    assert device_steps(events) == ["step 64", "step 16", "step 16"]
    assert [event["name"] for event in events if "request" in event["args"]] == ["prefill", "decode", "decode"]
    assert llm.engine.on_step == observers
