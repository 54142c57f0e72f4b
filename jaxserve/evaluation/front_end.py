"""What the doors cost: CPU time of the server's threads per output token, and the tokens that get through them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxserve.config import option
from jaxserve.engine.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.evaluation.streams import DOORS, open_stream
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.client import AsyncClient
from jaxserve.server.engine_thread import THREAD_NAME
from jaxserve.server.process import ServerProcess

IN_PROCESS = "in process"


@dataclass(frozen=True, kw_only=True)
class FrontEndConfig:
    """The load of one round. Raises ConfigError."""

    streams: int = option(64, "streams at once, all that there are in a round")
    prompt_characters: int = option(32, "of each prompt")
    output_tokens: int = option(64, "forced output tokens of each")
    rounds: int = option(5, "rounds of each way, which take turns; medians are shown")

    def __post_init__(self) -> None:
        for name in ("streams", "prompt_characters", "output_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def prompts(self) -> list[str]:
        return [chr(ord("a") + index % 26) * self.prompt_characters for index in range(self.streams)]


@dataclass(frozen=True)
class CpuSeconds:
    """CPU time of a process, by what its threads do."""

    engine: float
    """The thread that schedules and launches steps, with what the device computes in it where that is a CPU."""
    loop: float
    """The event loop of both doors; none in process."""
    rest: float
    """The others: those of XLA, gRPC and tokenizers."""


@dataclass(frozen=True)
class Round:
    """One way, once."""

    seconds: float
    num_tokens: int
    cpu: CpuSeconds

    def row(self) -> dict[str, float]:
        """Tokens per second, and microseconds of CPU time per token."""
        per_token = {f"{name} us": 1e6 * seconds / self.num_tokens for name, seconds in vars(self.cpu).items()}
        return {"tokens/s": self.num_tokens / self.seconds, **per_token}


def thread_seconds(pid: int) -> dict[int, tuple[str, float]]:
    """The name and the CPU seconds of every thread of a process, by its id, on Linux."""
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name, times = (task / "comm").read_text().strip(), (task / "schedstat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        threads[int(task.name)] = name, int(times.split()[0]) / 1e9
    return threads


def server_cpu(pid: int, before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]) -> CpuSeconds:
    """What a server's threads spent in between. Its main thread runs the event loop."""
    spent = {task: seconds - before.get(task, ("", 0.0))[1] for task, (_, seconds) in after.items()}
    engine, loop = sum(spent[task] for task, (name, _) in after.items() if name == THREAD_NAME), spent[pid]
    return CpuSeconds(engine, loop, sum(spent.values()) - engine - loop)


def measure_front_end(engine: Engine, server: ServerProcess, config: FrontEndConfig) -> dict[str, list[Round]]:
    """Rounds of each way: this engine in this thread, and through both doors of a server with the same engine, whose
    clients are in this process. One of each, which warms caches, is discarded."""
    ways: dict[str, Callable[[], Round]] = {IN_PROCESS: partial(_in_process, engine, config)}
    ways |= {door: partial(_through, server, door, config) for door in DOORS}
    rounds: dict[str, list[Round]] = {way: [] for way in ways}
    for number in range(config.rounds + 1):
        order = [*list(ways)[number % len(ways) :], *list(ways)[: number % len(ways)]]
        for way in order:
            done = ways[way]()
            if number:
                rounds[way].append(done)
    return rounds


def _in_process(engine: Engine, config: FrontEndConfig) -> Round:
    params = SamplingParams(temperature=0, max_tokens=config.output_tokens, ignore_eos=True)
    started_seconds, started_cpu, started_thread = time.monotonic(), time.process_time(), time.thread_time()
    for index, prompt in enumerate(config.prompts):
        engine.add_request(f"front-end-{index}", engine.tokenizer.encode(prompt), params)
    num_tokens = 0
    while engine.has_unfinished():
        num_tokens += sum(len(delta.token_ids) for delta in engine.step())
    own = time.thread_time() - started_thread
    rest = time.process_time() - started_cpu - own
    return Round(time.monotonic() - started_seconds, num_tokens, CpuSeconds(own, 0.0, rest))


def _through(server: ServerProcess, door: str, config: FrontEndConfig) -> Round:
    async def run() -> int:
        async def read(client: AsyncClient, prompt: str) -> int:
            return sum([number async for number in open_stream(server, client, door, prompt, config.output_tokens)])

        async with AsyncClient(server.address) as client:
            return sum(await asyncio.gather(*(read(client, prompt) for prompt in config.prompts)))

    before, started_seconds = thread_seconds(server.pid), time.monotonic()
    num_tokens = asyncio.run(run())
    seconds = time.monotonic() - started_seconds
    return Round(seconds, num_tokens, server_cpu(server.pid, before, thread_seconds(server.pid)))


def rows(rounds: Mapping[str, Sequence[Round]]) -> list[dict[str, str]]:
    """Medians of each way, and its rate beside that in process, round by round."""
    table = []
    for way, done in rounds.items():
        medians = {name: statistics.median(r.row()[name] for r in done) for name in done[0].row()}
        shares = [r.row()["tokens/s"] / p.row()["tokens/s"] for r, p in zip(done, rounds[IN_PROCESS], strict=True)]
        texts = {name: f"{value:,.0f}" for name, value in medians.items()}
        share = {"of in process": f"{statistics.median(shares):.1%}"}
        table.append({"way": way, "tokens/s": texts.pop("tokens/s")} | share | texts)
    return table
