"""The crowd of a soak and the streams it reads, against a fake engine; and which measurements miss their bars."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.soak import SoakConfig, SoakResult, Tally, rss_bytes, run_crowd
from jaxserve.evaluation.streams import DOORS, AbortedStreamError, StreamError, open_stream
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.process import ServerProcess


@pytest.fixture
def doors(make_server):
    server = make_server(http_port=0)
    return server, ServerProcess(server.target, server.url, os.getpid())


@pytest.mark.parametrize("door", DOORS)
def test_streams_tell_their_tokens(doors, door):
    server, process = doors

    async def read() -> list[int]:
        async with AsyncClient(server.target) as client:
            return [number async for number in open_stream(process, client, door, "abc", 20)]

    numbers = asyncio.run(read())
    assert sum(numbers) == 20
    assert len(numbers) > 5


@pytest.mark.parametrize("door", DOORS)
def test_streams_that_are_closed_are_aborted(doors, door, eventually):
    server, process = doors

    async def leave() -> None:
        async with AsyncClient(server.target) as client:
            stream = open_stream(process, client, door, "abc", 900)
            await anext(stream)
            await stream.aclose()

    asyncio.run(leave())
    eventually(lambda: server.engine.aborted and not server.admission.num_active)


def test_streams_that_others_abort_say_so(doors):
    server, process = doors

    async def read() -> None:
        async with AsyncClient(server.target) as client:
            async for _ in open_stream(process, client, "gRPC", "abc", 900, "mine"):
                with Client(server.target) as other:
                    await asyncio.to_thread(other.abort, "mine")

    with pytest.raises(AbortedStreamError):
        asyncio.run(read())


def test_refusals_have_the_servers_words(doors):
    server, process = doors

    async def read() -> None:
        async with AsyncClient(server.target) as client:
            async for _ in open_stream(process, client, "HTTP", "a" * 2000, 3):
                pass

    with pytest.raises(StreamError, match=r"400 .*exceeds max_model_len 1000"):
        asyncio.run(read())


def test_a_rude_crowd_is_accounted_for(doors, eventually):
    server, process = doors
    tally = run_crowd(process, 20, 1.5, True)
    assert tally.started == sum(tally.ends.values()) > 20
    assert not tally.errors
    assert {"finished", "left"} <= set(tally.ends)
    eventually(lambda: server.admission.num_active == 0 and not server.engine.running)


def result(**changes) -> SoakResult:
    fields = {
        "tally": Tally(10, Counter(finished=6, left=3, aborted=1)), "calm_tbt_seconds": [0.01] * 9,
        "rude_tbt_seconds": [0.015] * 9, "first_rss_bytes": 2**30, "last_rss_bytes": 2**30, "num_counted": 9,
        "left_over": {"num_requests_running": 0.0},
    }  # fmt: skip
    return SoakResult(**fields | changes)


def missed(soaked: SoakResult) -> list[str]:
    return [row["what"].strip() for row in soaked.rows() if row["met"] == "NO"]


def test_bars_that_are_met():
    assert missed(result()) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tally": Tally(11, Counter(finished=6, left=3, aborted=1))}, "6 finished"),
        ({"tally": Tally(10, Counter(finished=6, left=3, failed=1))}, "failed"),
        ({"num_counted": 5}, "requests counted by engines"),
        ({"num_counted": 11}, "requests counted by engines"),
        ({"left_over": {"kv_cache_usage_perc": 0.1}}, "kv_cache_usage_perc"),
        ({"last_rss_bytes": 1.06 * 2**30}, "resident memory, MiB"),
        ({"rude_tbt_seconds": [0.021]}, "P99 TBT, ms"),
        ({"rude_tbt_seconds": []}, "P99 TBT, ms"),
    ],
)
def test_bars_that_are_missed(changes, what):
    (only,) = missed(result(**changes))
    assert what in only


def test_the_memory_of_a_process_is_told():
    assert 2**24 < rss_bytes(os.getpid()) < 2**40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": 1}, "streams must be at least 2, got 1"),
        ({"well_behaved": 1}, "well_behaved must be at least 2, got 1"),
        ({"seconds": 3.0}, "seconds must be at least 4, got 3"),
        ({"seconds": float("nan")}, "seconds must be at least 4, got nan"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        SoakConfig(**changes)
