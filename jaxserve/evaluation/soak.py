"""Hundreds of streams whose readers leave, cancel and dawdle, and what a few well-behaved ones see of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np

from jaxserve.config import option
from jaxserve.errors import ConfigError
from jaxserve.evaluation.scrape import scrape
from jaxserve.evaluation.streams import DOORS, AbortedStreamError, StreamError, open_stream
from jaxserve.server.client import AsyncClient, Client
from jaxserve.server.process import ServerProcess

MAX_RSS_GROWTH = 1.05
"""Of the server's resident memory, from the end of the rude crowd's first minute on."""
MAX_TBT_RATIO = 2.0
"""P99 TBT of the well-behaved streams beside rude ones, to that beside as many that are well-behaved, too."""
WARM_SECONDS = 60.0
IDLE_SECONDS = 20.0
"""How long the server may take to be idle once everybody has gone."""
MAX_ERRORS = 5
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 200, 300
WELL_BEHAVED_TOKENS = 200
BEHAVIOURS = {"reads on": 4, "leaves": 3, "is aborted": 1, "dawdles": 2}
"""And how many of ten streams do so."""


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Who asks, and for how long. Raises ConfigError."""

    streams: int = option(200, "streams at once, half of them over HTTP, that leave, are aborted, dawdle or read on")
    well_behaved: int = option(8, "streams beside them whose time between tokens is measured")
    seconds: float = option(300.0, "how long; before it, a fourth of that with streams that all read on")

    def __post_init__(self) -> None:
        for name in ("streams", "well_behaved"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, got {getattr(self, name)}")
        if not self.seconds >= 4:
            raise ConfigError(f"seconds must be at least 4, got {self.seconds:g}")


@dataclass
class Tally:
    """How streams ended, as their readers saw it."""

    started: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


@dataclass
class SoakResult:
    """What the server was like at its end, beside what its clients did."""

    tally: Tally
    calm_tbt_seconds: list[float]
    rude_tbt_seconds: list[float]
    first_rss_bytes: int
    last_rss_bytes: int
    num_counted: int
    """Requests that the engine says have ended."""
    left_over: dict[str, float]
    """Gauges that must be 0 once everybody has gone."""

    @property
    def tbt_ratio(self) -> float:
        return p99(self.rude_tbt_seconds) / p99(self.calm_tbt_seconds)

    def rows(self) -> list[dict[str, str]]:
        """A table of measurements beside their bars."""
        ends, growth = self.tally.ends, self.last_rss_bytes / self.first_rss_bytes
        accounted, mib = sum(ends.values()), 2**20
        bars = [
            ("streams started", f"{self.tally.started}", "", True),
            ("  " + ", ".join(f"{number} {end}" for end, number in sorted(ends.items())), f"{accounted}",
             "all", accounted == self.tally.started),
            ("  failed", f"{ends['failed']}", "0", not ends["failed"]),
            # Who leaves before its request has reached an engine is in no count of theirs.
            ("requests counted by engines", f"{self.num_counted}", "none more, at least all that finished",
             ends["finished"] + ends["aborted"] <= self.num_counted <= self.tally.started),
            *((name, f"{value:g}", "0", value == 0) for name, value in self.left_over.items()),
            ("resident memory, MiB", f"{self.first_rss_bytes / mib:.0f} to {self.last_rss_bytes / mib:.0f}",
             f"x {growth:.3f} <= {MAX_RSS_GROWTH}", growth <= MAX_RSS_GROWTH),
            ("P99 TBT, ms", f"{1e3 * p99(self.calm_tbt_seconds):.1f} to {1e3 * p99(self.rude_tbt_seconds):.1f}",
             f"x {self.tbt_ratio:.2f} <= {MAX_TBT_RATIO}", self.tbt_ratio <= MAX_TBT_RATIO),
        ]  # fmt: skip
        return [
            {"what": what, "measured": measured, "bar": bar, "met": "yes" if met else "NO"}
            for what, measured, bar, met in bars
        ]


def p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) if seconds else float("nan")


def soak(server: ServerProcess, config: SoakConfig) -> SoakResult:
    """Both phases against one server, which nobody else uses. The crowd has a process of its own, so that the
    well-behaved readers are late only where the server is."""
    tally, num_before = Tally(), num_ended(server)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        tbt_seconds: list[list[float]] = []
        for seconds, is_rude in ((config.seconds / 4, False), (config.seconds, True)):
            crowd = process.submit(run_crowd, server, config.streams, seconds, is_rude)
            measured, first_rss_bytes = asyncio.run(_well_behaved(server, config, seconds))
            done = crowd.result()
            tally.started += done.started + measured.started
            tally.ends += done.ends + measured.ends
            tally.errors += done.errors + measured.errors
            tbt_seconds.append(measured.tbt_seconds)
    calm, rude = tbt_seconds
    left_over = _when_idle(server)
    num_counted = num_ended(server) - num_before
    return SoakResult(tally, calm, rude, first_rss_bytes, rss_bytes(server.pid), num_counted, left_over)


@dataclass
class _Measured(Tally):
    tbt_seconds: list[float] = field(default_factory=list)


async def _well_behaved(server: ServerProcess, config: SoakConfig, seconds: float) -> tuple[_Measured, int]:
    """The times between what the well-behaved readers get; and the server's memory once it is warm."""
    measured, until_seconds = _Measured(), time.monotonic() + seconds

    async def read(client: AsyncClient, index: int) -> None:
        while time.monotonic() < until_seconds:
            stream = open_stream(server, client, DOORS[index % 2], "w" * 32, WELL_BEHAVED_TOKENS)
            measured.started += 1
            try:
                last_seconds = None
                async for _ in stream:
                    now_seconds = time.monotonic()
                    if last_seconds is not None:
                        measured.tbt_seconds.append(now_seconds - last_seconds)
                    last_seconds = now_seconds
                measured.ends["finished"] += 1
            except (StreamError, grpc.aio.AioRpcError, OSError) as error:
                _failed(measured, error)

    async with AsyncClient(server.address) as client, asyncio.TaskGroup() as group:
        for index in range(config.well_behaved):
            group.create_task(read(client, index))
        await asyncio.sleep(min(WARM_SECONDS, seconds / 2))
        warm_rss_bytes = rss_bytes(server.pid)
    return measured, warm_rss_bytes


def run_crowd(server: ServerProcess, num_streams: int, seconds: float, rude: bool) -> Tally:
    """As many streams at once, each followed by another until the time is over. Only a ``rude`` crowd misbehaves."""
    return asyncio.run(_Crowd(server, rude, time.monotonic() + seconds).run(num_streams))


class _Crowd:
    def __init__(self, server: ServerProcess, rude: bool, until_seconds: float) -> None:
        self._server, self._rude, self._until_seconds = server, rude, until_seconds
        self._tally, self._ids, self._random = Tally(), itertools.count(), random.Random(0)

    async def run(self, num_streams: int) -> Tally:
        with Client(self._server.address) as aborting:
            async with AsyncClient(self._server.address) as client, asyncio.TaskGroup() as group:
                for index in range(num_streams):
                    group.create_task(self._one_after_the_other(client, aborting, DOORS[index % 2]))
        return self._tally

    async def _one_after_the_other(self, client: AsyncClient, aborting: Client, door: str) -> None:
        while time.monotonic() < self._until_seconds:
            self._tally.started += 1
            try:
                self._tally.ends[await self._one(client, aborting, door)] += 1
            except AbortedStreamError:
                self._tally.ends["aborted"] += 1
            except (StreamError, grpc.aio.AioRpcError, OSError) as error:
                _failed(self._tally, error)

    async def _one(self, client: AsyncClient, aborting: Client, door: str) -> str:
        """One stream; how it ended."""
        pick, request_id = self._random, f"soak-{os.getpid()}-{next(self._ids)}"
        (behaviour,) = pick.choices(list(BEHAVIOURS), list(BEHAVIOURS.values())) if self._rude else ("reads on",)
        num_tokens = pick.randint(20, MAX_OUTPUT_TOKENS)
        patience_tokens = pick.randint(0, num_tokens)
        prompt = "p" * pick.randint(1, MAX_PROMPT_TOKENS)
        num_seen = 0
        async with contextlib.aclosing(
            open_stream(self._server, client, door, prompt, num_tokens, request_id)
        ) as stream:
            if behaviour == "leaves" and patience_tokens < 5:  # before the first token, or about then
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_tokens * 0.005):
                        await anext(stream)
                return "left"
            async for num_new in stream:
                num_seen += num_new
                if behaviour == "leaves" and num_seen > patience_tokens:
                    return "left"
                if behaviour == "is aborted" and num_seen > patience_tokens:
                    if door == "HTTP":  # which has no way to abort but to leave
                        return "left"
                    await asyncio.to_thread(aborting.abort, request_id)
                    behaviour = "reads on"
                if behaviour == "dawdles" and time.monotonic() < self._until_seconds:
                    await asyncio.sleep(pick.uniform(0, 0.2))
        return "finished"


def _failed(tally: Tally, error: Exception) -> None:
    tally.ends["failed"] += 1
    if len(tally.errors) < MAX_ERRORS:
        tally.errors.append(f"{type(error).__name__}: {error!s:.300}")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, on Linux."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _samples(server: ServerProcess) -> dict[str, float]:
    """The server's metrics; those with labels are summed."""
    values: Counter[str] = Counter()
    for sample in scrape(f"{server.url}/metrics"):
        values[sample.name] += sample.value  # type: ignore[assignment]
    return dict(values)


def num_ended(server: ServerProcess) -> int:
    """Requests that the engines have seen the end of, whatever it was."""
    return int(_samples(server).get("jaxserve_request_success_total", 0))


def _when_idle(server: ServerProcess) -> dict[str, float]:
    """Gauges that must be 0, once they are, or have not become so in time."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "compiles_after_warmup")
    deadline_seconds = time.monotonic() + IDLE_SECONDS
    while True:
        samples = _samples(server)
        left_over = {name: samples[f"jaxserve_{name}"] for name in names}
        if not any(left_over.values()) or time.monotonic() > deadline_seconds:
            return left_over
        time.sleep(0.1)
