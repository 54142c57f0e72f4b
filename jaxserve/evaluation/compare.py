"""jaxserve beside its peers: the same model, prompts and lengths, round by round in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from jaxserve.config import cache_dir, option
from jaxserve.errors import ConfigError
from jaxserve.evaluation.contestants import PROGRAMS, Contestant, ContestantError, ContestantProcess, Round
from jaxserve.evaluation.latency import Percentiles, RunResult
from jaxserve.evaluation.load import make_prompts
from jaxserve.evaluation.report import machine
from jaxserve.evaluation.workload import WorkloadConfig, WorkloadRequest, make_workload
from jaxserve.models.loading.files import read_json
from jaxserve.models.loading.gguf import GGUFSource, write_hf_folder
from jaxserve.models.loading.hub import resolve
from jaxserve.models.registry import read_config

REFERENCE = Contestant("jaxserve", "float32")
"""Whose tokens the others' are compared with."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is measured: all at once, for throughput, then requests that come at a rate, for latency.

    Raises ConfigError.
    """

    model: str = option("smollm2-135m", "smollm2-135m, a Hugging Face folder or a .gguf file")
    rounds: int = option(5, "rounds, in which the contestants take turns")
    num_requests: int = option(16, "offline: requests, all at once")
    num_prompt_tokens: int = option(151, "offline: tokens of each prompt")
    num_output_tokens: int = option(64, "offline: forced output tokens of each")
    shortest: float = option(
        1.0, "offline: share of these lengths that the shortest prompt and output have, the others uniform in between"
    )
    rate: float = option(1.0, "online: Poisson arrivals per second; their lengths are uniform")
    num_online_requests: int = option(8, "online: requests of a round; 0: offline alone")
    max_total_tokens: int = option(384, "online: most tokens of prompt and output together, a quarter of them output")
    token_budget: int = option(256, "most tokens in one step of a contestant")
    max_num_seqs: int = option(16, "most sequences that run at once")
    max_model_len: int = option(2048, "longest prompt + output")
    timeout_seconds: float = option(600.0, "how long a contestant may take to load, or for one workload")

    def __post_init__(self) -> None:
        for name in ("rounds", "num_requests", "num_prompt_tokens", "num_output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_online_requests < 0:
            raise ConfigError(f"num_online_requests must not be negative, got {self.num_online_requests}")
        if not 0 < self.shortest <= 1:
            raise ConfigError(f"shortest must be in (0, 1], got {self.shortest:g}")
        if not self.timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be above 0, got {self.timeout_seconds:g}")
        longest = max(self.num_prompt_tokens + self.num_output_tokens, self.max_total_tokens)
        if longest > self.max_model_len:
            raise ConfigError(f"max_model_len must hold the longest request of {longest}, got {self.max_model_len}")
        self.workload(0, max(1, self.num_online_requests))  # checks the rate and the lengths

    def offline(self) -> list[WorkloadRequest]:
        """The same for all contestants and rounds."""
        prompts, outputs = (
            np.random.default_rng(seed).integers(math.ceil(self.shortest * most), most + 1, self.num_requests).tolist()
            for seed, most in enumerate((self.num_prompt_tokens, self.num_output_tokens))
        )
        return [WorkloadRequest(0.0, *lengths) for lengths in zip(prompts, outputs, strict=True)]

    def warm_up(self) -> list[WorkloadRequest]:
        """Offline, but outputs are no longer than it takes to have all requests decode at once."""
        most = self.offline()[: 2 * self.max_num_seqs]
        return [replace(r, num_output_tokens=min(r.num_output_tokens, 16)) for r in most]

    def online(self, seed: int) -> list[WorkloadRequest]:
        """Arrivals and lengths that differ from round to round, and are the same for all contestants."""
        return self.workload(seed, self.num_online_requests)

    def workload(self, seed: int, num_requests: int) -> list[WorkloadRequest]:
        return make_workload(
            WorkloadConfig(
                lengths="uniform",
                max_total_tokens=self.max_total_tokens,
                prompt_output_ratio=3,
                rate=self.rate,
                num_requests=num_requests,
                workload_seed=seed,
            )
        )


@dataclass
class Outcome:
    """One contestant's rounds; a contestant that failed has fewer than the others."""

    name: str
    packages: Mapping[str, str] = field(default_factory=dict)
    offline: list[Round] = field(default_factory=list)
    online: list[Round] = field(default_factory=list)
    failure: str | None = None

    @property
    def tokens_per_second(self) -> list[float]:
        """Offline, by round."""
        return [round.output_tokens_per_second for round in self.offline]

    @cached_property
    def latency(self) -> RunResult:
        """All online rounds as one."""
        runs = [round.run for round in self.online]
        return RunResult(
            requests=[request for run in runs for request in run.requests],
            seconds=sum(run.seconds for run in runs),
            num_prompt_tokens=sum(run.num_prompt_tokens for run in runs),
            num_output_tokens=sum(run.num_output_tokens for run in runs),
        )

    def speed_up(self, other: Outcome) -> float:
        """Median over rounds of this one's throughput over the other's, which ran minutes apart at most."""
        pairs = zip(self.tokens_per_second, other.tokens_per_second, strict=False)
        return statistics.median([mine / theirs for mine, theirs in pairs] or [math.nan])

    def agreement(self, other: Outcome) -> float:
        """Share of the tokens offline that are the other's too; after a first difference few are."""
        pairs = zip(self.offline, other.offline, strict=False)
        same = [np.equal(*map(np.concatenate, (mine.token_ids, theirs.token_ids))) for mine, theirs in pairs]
        return float(np.mean(same)) if same else math.nan


class Comparison:
    """Contestants whose models are loaded; all but the one whose turn it is wait for input, which costs nothing."""

    def __init__(
        self,
        processes: Mapping[Contestant, ContestantProcess],
        config: CompareConfig,
        vocab_size: int,
        say: Callable[[str], None],
    ) -> None:
        self._processes = processes
        self._config = config
        self._vocab_size = vocab_size
        self._say = say
        self.outcomes = {contestant: Outcome(str(contestant)) for contestant in processes}

    def start(self) -> None:
        """Wait until all have loaded; a short offline workload each, discarded, warms them up."""
        for contestant in self._in_turns(0):
            with self._failing(contestant, "start"):
                process, outcome = self._processes[contestant], self.outcomes[contestant]
                outcome.packages = process.wait_ready(self._config.timeout_seconds)
                self._say(f"{contestant} is ready: {', '.join(map(' '.join, outcome.packages.items()))}")
        for contestant in self._in_turns(0):
            with self._failing(contestant, "warm-up"):
                self._run(contestant, self._config.warm_up(), seed=self._config.rounds)

    def round(self, number: int) -> None:
        """All contestants offline, then all online, each time another one first."""
        for contestant in self._in_turns(number):
            with self._failing(contestant, f"round {number + 1}, offline"):
                offline = self._run(contestant, self._config.offline(), number)
                self.outcomes[contestant].offline.append(offline)
                self._say(f"round {number + 1}  {contestant}: {offline.output_tokens_per_second:.1f} tokens/s offline")
        for contestant in self._in_turns(number):
            if PROGRAMS[contestant.program].takes_arrivals and self._config.num_online_requests:
                with self._failing(contestant, f"round {number + 1}, online"):
                    online = self._run(contestant, self._config.online(number), number)
                    self.outcomes[contestant].online.append(online)
                    seconds = Percentiles.of(online.run.tbt_seconds).at(50)
                    self._say(f"round {number + 1}  {contestant}: TBT p50 {1000 * seconds:.1f} ms online")

    def _in_turns(self, first: int) -> list[Contestant]:
        left = [contestant for contestant, outcome in self.outcomes.items() if outcome.failure is None]
        first %= max(1, len(left))
        return left[first:] + left[:first]

    def _run(self, contestant: Contestant, workload: Sequence[WorkloadRequest], seed: int) -> Round:
        prompts = make_prompts(workload, self._vocab_size, seed)
        return self._processes[contestant].run(workload, prompts, self._config.timeout_seconds)

    @contextmanager
    def _failing(self, contestant: Contestant, when: str) -> Iterator[None]:
        """Whoever fails is out; the others go on."""
        try:
            yield
        except ContestantError as error:
            self.outcomes[contestant].failure = f"{when}: {error}"
            self._say(f"{contestant} failed, {when}: {error}")


def compare(
    commands: Mapping[Contestant, Sequence[str]], config: CompareConfig, say: Callable[[str], None]
) -> list[Outcome]:
    """Start the contestants by their ``commands`` and run all rounds. Raises ConfigError and ModelError."""
    files = ModelFiles.of(config.model)
    settings = {"model": config.model, "model_file": files.gguf, "model_folder": files.folder}
    settings |= {name: getattr(config, name) for name in ("token_budget", "max_num_seqs", "max_model_len")}
    with ExitStack() as stack:
        processes = {}
        for contestant, command in commands.items():
            if files.gguf is None and PROGRAMS[contestant.program].reads_gguf_only:
                say(f"{contestant} is left out: it reads GGUF files only, model is {config.model!r}")
                continue
            processes[contestant] = ContestantProcess(command, settings | {"dtype": contestant.dtype})
            stack.callback(processes[contestant].close)
        comparison = Comparison(processes, config, files.vocab_size, say)
        comparison.start()
        for number in range(config.rounds):
            comparison.round(number)
        return list(comparison.outcomes.values())


@dataclass(frozen=True)
class ModelFiles:
    """The same weights for all: as a GGUF file, where that is what was given, and as a Hugging Face folder."""

    gguf: str | None
    folder: str
    vocab_size: int

    @classmethod
    def of(cls, model: str) -> Self:
        """A GGUF file's folder, in float32, is kept beside the other models in the cache. Raises ModelError."""
        path = resolve(model)
        if path.is_dir():
            return cls(None, str(path), read_config(read_json(path / "config.json"), model).vocab_size)
        source = GGUFSource(path)
        folder = cache_dir() / "models" / f"{path.stem}-float32"
        config = folder / "config.json"  # written last
        if not config.exists() or config.stat().st_mtime < path.stat().st_mtime:
            folder.mkdir(parents=True, exist_ok=True)
            write_hf_folder(source, folder)
        return cls(str(path), str(folder), source.config.vocab_size)


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The table: throughput offline, and its ratio to jaxserve's, then latency online."""
    jaxserves = [outcome for outcome in outcomes if outcome.name.startswith("jaxserve:")]
    reference = next((outcome for outcome in jaxserves if outcome.name == str(REFERENCE)), None)
    table = []
    for outcome in outcomes:
        speeds = outcome.tokens_per_second or [math.nan]
        ttft, tbt = Percentiles.of(outcome.latency.ttft_seconds), Percentiles.of(outcome.latency.tbt_seconds)
        row = {
            "contestant": outcome.name,
            "rounds": str(len(outcome.offline)),
            "output tokens/s": _shown(statistics.median(speeds), 1),
            "min - max": f"{_shown(min(speeds), 1)} - {_shown(max(speeds), 1)}",
        }
        row |= {f"x {other.name}": _shown(outcome.speed_up(other), 2) for other in jaxserves}
        if reference is not None:
            row["same tokens %"] = _shown(100 * outcome.agreement(reference), 1)
        row |= {f"TTFT p{percent} s": _shown(ttft.at(percent), 2) for percent in (50, 99)}
        row |= {f"TBT p{percent} ms": _shown(1000 * tbt.at(percent), 1) for percent in (50, 99)}
        table.append(row)
    return table


def _shown(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def to_json(outcomes: Sequence[Outcome], config: CompareConfig) -> dict[str, Any]:
    """What was measured, where, and on which versions; latencies as distributions."""
    return {
        "machine": machine(),
        "settings": vars(config),
        "table": rows(outcomes),
        "contestants": [
            {
                "name": outcome.name,
                "packages": outcome.packages,
                "failure": outcome.failure,
                "output_tokens_per_second": outcome.tokens_per_second,
                "ttft": asdict(Percentiles.of(outcome.latency.ttft_seconds)),
                "tbt": asdict(Percentiles.of(outcome.latency.tbt_seconds)),
            }
            for outcome in outcomes
        ],
    }
