"""What drafts gain: texts that repeat what was there, more or less, with and without speculation."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import DraftCounts, StepRecord
from jaxserve.evaluation.latency import RunSummary
from jaxserve.evaluation.serving import run_engine
from jaxserve.evaluation.throughput import measure_throughput
from jaxserve.evaluation.workload import WorkloadConfig

NAMES = (
    "order", "ticket", "parcel", "invoice", "voucher", "booking", "contract", "payment", "receipt", "customer",
    "supplier", "employee", "account", "product", "vehicle", "patient",
)  # fmt: skip
"""What the texts are about: one for each request."""
GAINING = ("repeat", "edit", "extract")
"""Texts that speculation is for."""


def _code(name: str) -> str:
    return (
        f"def total_{name}s({name}s):\n    total = 0\n    for {name} in {name}s:\n"
        f"        if {name}.status == 'open':\n            total += {name}.price * {name}.count\n    return total\n\n\n"
        f"def find_{name}({name}s, number):\n    for {name} in {name}s:\n        if {name}.number == number:\n"
        f"            return {name}\n    return None\n\n\n"
        f"def print_{name}s({name}s):\n    for {name} in {name}s:\n        print({name}.number, {name}.status)\n"
    )


def _records(name: str) -> str:
    cities = ("Paris", "Rome", "Oslo", "Berlin", "Madrid", "Vienna", "Dublin", "Lisbon")
    return "\n".join(
        f"{name} {100 + 7 * i}: city {city}, status {'open' if i % 2 else 'closed'}, price {12 * i + 5} euros"
        for i, city in enumerate(cities)
    )


class Text(NamedTuple):
    """What a user asks for, and how the answer begins: so small models do what they are asked for."""

    asked: str
    answer: str


KINDS: dict[str, Callable[[str], Text]] = {
    "repeat": lambda name: Text(
        "Write the same sentence again and again.", f"The {name} was sent on Monday and came back on Friday.\n" * 3
    ),
    "edit": lambda name: Text(
        f"Here is a Python file:\n\n{_code(name)}\nWrite the whole file again, with the attribute `status` renamed to "
        f"`state`. Only write the code.",
        f"```python\ndef total_{name}s({name}s):\n    total = 0\n",
    ),
    "extract": lambda name: Text(
        f"Here is a list:\n\n{_records(name)}\n\nCopy the lines of the list whose status is open.",
        f"{name} 107: city Rome, status open, price 17 euros\n",
    ),
    "open": lambda name: Text(
        f"Write a long story about a {name} that changed the life of a small town by the sea.", "Once"
    ),
}


@dataclass(frozen=True)
class Speed:
    """Of one kind of text, ``batch`` requests at once."""

    kind: str
    batch: int
    plain_tokens_per_second: float
    tokens_per_second: float
    gain: float
    """The median of the rounds' ratios."""
    drafts: DraftCounts
    """Of all rounds together."""
    num_decodes: int
    """Times that a sequence decoded in a step, in all rounds."""

    def row(self) -> dict[str, str]:
        drafts = self.drafts
        return {
            "text": self.kind,
            "batch": str(self.batch),
            "off, tokens/s": f"{self.plain_tokens_per_second:.1f}",
            "drafts, tokens/s": f"{self.tokens_per_second:.1f}",
            "gain": f"{self.gain:.2f}x",
            "tokens a decode": f"{1 + drafts.num_held / max(1, self.num_decodes):.2f}",
            "accepted": f"{drafts.acceptance:.0%}",
            "wasted rows": f"{drafts.wasted_share:.0%}",
        }


class SpeculationBench:
    """Two engines that differ in ``speculative`` alone; prompts come from the prefix cache, so decodes are measured."""

    def __init__(self, config: EngineConfig, *, rounds: int, output_tokens: int) -> None:
        config = dataclasses.replace(config, enable_prefix_caching=True)
        self._plain = Engine(dataclasses.replace(config, speculative="off"))
        self._speculating = Engine(config)
        self._rounds, self._output_tokens = rounds, output_tokens

    def speeds(self, kinds: Sequence[str], batches: Sequence[int]) -> Iterator[Speed]:
        for batch in batches:
            for kind in kinds:
                yield self._measure(kind, batch)

    def loads(self, workload: WorkloadConfig) -> list[tuple[RunSummary, RunSummary]]:
        """The workload without drafts and with them, in each round of another seed, after a warm-up."""
        engines = [self._plain, self._speculating]
        for engine in engines:
            run_engine(engine, dataclasses.replace(workload, num_requests=2, duration_seconds=None))
        found = []
        for number in range(self._rounds):
            same = dataclasses.replace(workload, workload_seed=workload.workload_seed + number)
            engines.reverse()
            runs = {engine: run_engine(engine, same).summary() for engine in engines}
            found.append((runs[self._plain], runs[self._speculating]))
        return found

    def close(self) -> None:
        self._plain.close()
        self._speculating.close()

    def _measure(self, kind: str, batch: int) -> Speed:
        drafts, decodes = DraftCounts(), [0]

        def watch(step: StepRecord, _: object) -> None:
            drafts.merge(step.drafts)
            decodes[0] += step.num_decode_tokens - step.drafts.num_rows

        engines = self._plain, self._speculating
        prompts = [self._prompt(kind, NAMES[index % len(NAMES)]) for index in range(batch)]
        for engine in engines:  # into the cache
            measure_throughput(engine, prompts, 2)
        self._speculating.on_step.append(watch)
        rounds = [
            [measure_throughput(engine, prompts, self._output_tokens).output_tokens_per_second for engine in engines]
            for _ in range(self._rounds)
        ]
        self._speculating.on_step.remove(watch)
        plain, speculating = (statistics.median(column) for column in zip(*rounds, strict=True))
        gain = statistics.median(with_drafts / without for without, with_drafts in rounds)
        return Speed(kind, batch, plain, speculating, gain, drafts, decodes[0])

    def _prompt(self, kind: str, name: str) -> list[int]:
        text, tokenizer = KINDS[kind](name), self._plain.tokenizer
        asked = tokenizer.apply_chat_template([{"role": "user", "content": text.asked}])
        return tokenizer.encode(asked + text.answer, add_special_tokens=False)


MEASURES: dict[str, Callable[[RunSummary], float]] = {
    "output tokens/s": lambda run: run.output_tokens_per_second,
    "P50 TBT, ms": lambda run: 1000 * run.tbt.at(50),
    "P99 TBT, ms": lambda run: 1000 * run.tbt.at(99),
    "P50 TTFT, ms": lambda run: 1000 * run.ttft.at(50),
}


def load_rows(rounds: Sequence[tuple[RunSummary, RunSummary]]) -> list[dict[str, str]]:
    """Medians over the rounds, and of the rounds' ratios."""
    rows = []
    for name, measure in MEASURES.items():
        values = [(measure(plain), measure(speculating)) for plain, speculating in rounds]
        off, drafts = (statistics.median(column) for column in zip(*values, strict=True))
        ratio = statistics.median(speculating / plain for plain, speculating in values)
        rows.append({"": name, "off": f"{off:.1f}", "drafts": f"{drafts:.1f}", "ratio": f"{ratio:.3f}"})
    return rows


def mean_gains(speeds: Sequence[Speed]) -> dict[int, float]:
    """By batch, the geometric mean over the texts that speculation is for."""
    gains = {
        batch: [speed.gain for speed in speeds if speed.batch == batch and speed.kind in GAINING]
        for batch in dict.fromkeys(speed.batch for speed in speeds)
    }
    return {batch: math.prod(found) ** (1 / len(found)) for batch, found in gains.items() if found}
