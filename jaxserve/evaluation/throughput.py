"""Offline throughput of an engine, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import StepRecord
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk


@dataclass
class StepTimes:
    """Sums over steps, in seconds and rows; give ``observe`` to ``Engine.on_step``."""

    num_steps: int = 0
    device_seconds: float = 0.0
    """The device had a step to work on."""
    host_seconds: float = 0.0
    """The device was idle between two steps: what the host failed to hide."""
    num_rows: int = 0
    num_tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    _last_ready_seconds: float | None = None

    def observe(self, step: StepRecord, chunks: list[Chunk]) -> None:
        if self._last_ready_seconds is not None:
            self.host_seconds += step.device_start_seconds - self._last_ready_seconds
        self.step_seconds.append(step.ready_seconds - step.device_start_seconds)
        self.device_seconds += self.step_seconds[-1]
        self.num_rows += step.num_rows
        self.num_tokens += step.num_tokens
        self.num_steps += 1
        self._last_ready_seconds = step.ready_seconds


@dataclass(frozen=True)
class ThroughputResult:
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    steps: StepTimes

    @property
    def output_tokens_per_second(self) -> float:
        return self.num_output_tokens / self.seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.num_prompt_tokens / self.seconds


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids. Low ids are left out: many vocabularies keep control tokens there."""
    return np.random.default_rng(seed).integers(min(1000, vocab_size // 2), vocab_size, (count, length)).tolist()


def measure_throughput(engine: Engine, prompts: list[list[int]], num_output_tokens: int) -> ThroughputResult:
    """All prompts at once, each with a forced number of output tokens, greedy."""
    steps = StepTimes()
    engine.on_step.append(steps.observe)
    params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"throughput-{index}", prompt, params)
    while engine.has_unfinished():
        engine.step()
    seconds = time.perf_counter() - start
    engine.on_step.remove(steps.observe)
    return ThroughputResult(seconds, sum(map(len, prompts)), len(prompts) * num_output_tokens, steps)
