"""bench.py sharing: its engines, its rounds and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.config import EngineConfig, option
from jaxserve.engine.engine import Engine
from jaxserve.evaluation.sharing import measure_fairness, measure_floor, measure_grammars, measure_prefixes

Rows = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """What is asked of the engine."""

    rounds: int = option(3, "rounds; medians are shown")
    streams: int = option(64, "grammars: requests that run at once")
    output_tokens: int = option(64, "grammars: forced tokens of each output")
    prompt_tokens: int = option(1500, "prefixes: of a prompt that comes twice; floor: of the long prompt")
    turns: int = option(10, "prefixes: of a chat")
    long_tokens: int = option(4096, "fairness: of a prompt of the client that floods")
    short_tokens: int = option(100, "fairness: of a prompt of the other")
    num_short: int = option(30, "fairness: how many it sends in a round")
    gap_seconds: float = option(2.0, "fairness: mean time between them")


@contextmanager
def _engines(*configs: EngineConfig) -> Iterator[list[Engine]]:
    engines = [Engine(config) for config in configs]
    yield engines
    for engine in engines:
        engine.close()


def _ms(values: Iterable[float]) -> str:
    return f"{1e3 * statistics.median(values):.1f}"


def _ratio(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.3f}"


def grammars(config: EngineConfig, asked: SharingConfig) -> Rows:
    """All streams constrained against all free; TBT of free ones beside constrained ones against beside free ones."""
    with _engines(replace(config, max_num_seqs=asked.streams)) as (engine,):
        rounds = [
            measure_grammars(engine, streams=asked.streams, output_tokens=asked.output_tokens, seed=seed)
            for seed in range(asked.rounds + 1)
        ][1:]
    tokens = asked.streams * asked.output_tokens
    return [
        {
            "streams": str(asked.streams),
            "free tokens/s": f"{tokens / statistics.median(r.free_seconds for r in rounds):.1f}",
            "constrained": f"{tokens / statistics.median(r.constrained_seconds for r in rounds):.1f}",
            "ratio": _ratio(r.free_seconds / r.constrained_seconds for r in rounds),
            "TBT p50 beside free ms": _ms(r.alone_p50_seconds for r in rounds),
            "beside constrained": _ms(r.beside_p50_seconds for r in rounds),
            "p50 ratio": _ratio(r.beside_p50_seconds / r.alone_p50_seconds for r in rounds),
            "p99 ratio": _ratio(r.beside_p99_seconds / r.alone_p99_seconds for r in rounds),
        }
    ]


def prefixes(config: EngineConfig, asked: SharingConfig) -> Rows:
    """With the prefix cache and without."""
    cached = replace(config, enable_prefix_caching=True)
    with _engines(cached, replace(config, enable_prefix_caching=False)) as (one, other):
        rounds = [
            measure_prefixes(one, other, prompt_tokens=asked.prompt_tokens, turns=asked.turns, seed=seed)
            for seed in range(asked.rounds + 1)
        ][1:]
    pairs = {
        "16 prompts that share nothing, to their ends": [r.no_hit for r in rounds],
        f"second prompt of {asked.prompt_tokens} tokens, TTFT": [r.again for r in rounds],
        f"16 that share {asked.prompt_tokens * 2 // 3} tokens, last TTFT": [r.together for r in rounds],
    }
    for turn in range(asked.turns):
        pairs[f"turn {turn + 1} of a chat, TTFT"] = [(r.turns[0][turn], r.turns[1][turn]) for r in rounds]
    return [
        {"what": name, "with ms": _ms(a for a, _ in some), "without ms": _ms(b for _, b in some),
         "ratio": _ratio(a / b for a, b in some)}
        for name, some in pairs.items()
    ]  # fmt: skip


def fairness(config: EngineConfig, asked: SharingConfig) -> Rows:
    """TTFT of a client's short prompts, alone and beside another's flood."""
    with _engines(config) as (engine,):
        rounds = [
            measure_fairness(
                engine, long_tokens=asked.long_tokens, short_tokens=asked.short_tokens, num_short=asked.num_short,
                gap_seconds=asked.gap_seconds, seed=seed,
            )
            for seed in range(asked.rounds)
        ]  # fmt: skip
    alone = np.concatenate([r.alone_seconds for r in rounds])
    beside = np.concatenate([r.beside_seconds for r in rounds])
    return [
        {
            "TTFT": f"p{share}",
            "alone ms": f"{1e3 * a:.1f}",
            "beside a flood ms": f"{1e3 * b:.1f}",
            "ratio": f"{b / a:.2f}",
        }
        for share in (50, 90, 99)
        for a, b in [(np.percentile(alone, share), np.percentile(beside, share))]
    ]


def floor(config: EngineConfig, asked: SharingConfig) -> Rows:
    """A stream beside a long prompt, under a fixed budget and under one that follows ``slo_tbt_seconds``."""
    rows = []
    for name, scheduler in (("fixed budget", "sarathi"), ("adaptive", "adaptive")):
        with _engines(replace(config, scheduler=scheduler)) as (engine,):
            rounds = [
                measure_floor(engine, prompt_tokens=asked.prompt_tokens, seed=seed) for seed in range(asked.rounds)
            ]
        tbt = np.concatenate([r.beside_tbt_seconds for r in rounds])
        rows.append(
            {
                "policy": name,
                "alone tokens/s": f"{1 / statistics.median(r.alone_tbt_seconds for r in rounds):.1f}",
                "beside": f"{1 / tbt.mean():.2f}",
                "TBT p50 ms": f"{1e3 * np.percentile(tbt, 50):.0f}",
                "p99": f"{1e3 * np.percentile(tbt, 99):.0f}",
                "prompt's TTFT s": f"{statistics.median(r.prompt_ttft_seconds for r in rounds):.2f}",
                "share of the room": ""
                if config.slo_tbt_seconds is None
                else f"{statistics.median(r.share_of_room(config.slo_tbt_seconds) for r in rounds):.2f}",
            }
        )
    return rows


PARTS: dict[str, Callable[[EngineConfig, SharingConfig], Rows]] = {
    "grammars": grammars, "prefixes": prefixes, "fairness": fairness, "floor": floor,
}  # fmt: skip
