"""What the host does in a step, on a runner without a device: scheduling, packing, processing of the tokens.

Times are the stepping thread's own CPU time, so other load on the machine counts as little as possible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.logits import EditLayout
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.step import Step, StepLayout, StepOutputs, step_layouts
from jaxserve.kernels.plan import BusyPrograms, Tiling, make_plan, new_plan
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.scheduler.buckets import bucket_of
from jaxserve.server.serve import freeze_start_up

TILING = Tiling(decode_tokens=128, prefill_rows=32, busy=BusyPrograms(decode=396, prefill=132, kv_heads=8))
"""Of Mistral-7B on an H100 (kernels/triton_attention.py)."""
LENGTHS = (400, 1000)
"""Least and most tokens of a prompt, and of its output: contexts are of about 1,000."""
WARM_STEPS = 200
"""Discarded once as many run as may: until then all contexts have begun at about the same time."""
clock = time.thread_time


class StubRunner:
    """What an engine asks of a ModelRunner. Every step is there at once, with tokens drawn before."""

    weights_seconds = compile_seconds = loading_seconds = 0.0
    has_steps = False
    draft = None

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, mesh: Mesh, *, show_progress: bool) -> None:
        self.num_blocks = config.num_blocks or 1 + config.max_num_seqs * config.blocks_per_seq
        self._layouts = step_layouts(config, self.num_blocks, TILING, checkpoint.config.window)
        shape = 64, config.max_num_seqs
        self._tokens = np.random.default_rng(0).integers(1000, checkpoint.config.vocab_size, shape, np.int32)
        self._num_steps = 0
        self.edits = EditLayout(checkpoint.config.vocab_size)

    def layout(self, num_tokens: int) -> StepLayout:
        return self._layouts[bucket_of(num_tokens, list(self._layouts))]

    def num_draws(self, step: Step) -> int:
        return step.layout.num_draws

    def launch(self, step: Step) -> Step:
        self._num_steps += 1
        step.record.num_rows = step.layout.num_rows
        return step

    def sample(self, step: Step, edits: None) -> None:
        tokens = self._tokens[self._num_steps % len(self._tokens)]
        step.outputs = StepOutputs(tokens, None)  # type: ignore[arg-type]

    def warm_up(self) -> None:
        """There is nothing to run."""

    def prepare_rare(self) -> None:
        """Nobody asks for prompt logprobs here, or edits."""

    def close(self) -> None:
        """Holds nothing."""


@dataclass
class HostTimes:
    """Seconds of each part, by step or call."""

    schedule: list[float] = field(default_factory=list)
    pack: list[float] = field(default_factory=list)
    """With the plan, and the launch, which is free here."""
    plan: list[float] = field(default_factory=list)
    """A part of ``pack``: made again by itself."""
    process: list[float] = field(default_factory=list)
    """Detokenising, stops, deltas."""
    step: list[float] = field(default_factory=list)
    """All of it, and what is in no part: metrics."""
    add: list[float] = field(default_factory=list)
    """One request."""
    abort: list[float] = field(default_factory=list)
    """One that waits, in the middle of the queue."""

    def row(self) -> dict[str, str]:
        """Medians in microseconds, and the slowest steps."""
        cells = {name: statistics.median(seconds) for name, seconds in vars(self).items()}
        cells["schedule + pack"] = statistics.median(map(sum, zip(self.schedule, self.pack, strict=True)))
        cells |= {"step P99": float(np.percentile(self.step, 99)), "step max": max(self.step)}
        return {name: f"{1e6 * seconds:.0f}" for name, seconds in cells.items()}


class HostBench:
    """An engine that has as many requests running as it may, and ``num_waiting`` in its queue before every step."""

    def __init__(self, config: EngineConfig, num_waiting: int) -> None:
        self._engine = Engine(config, make_runner=StubRunner, show_progress=False, clock=clock)  # type: ignore[arg-type]
        self._engine.on_step.append(self._observe)
        freeze_start_up()
        self._num_waiting, self._num_added = num_waiting, 0
        self._random = np.random.default_rng(0)
        self._prompt = self._random.integers(1000, self._engine.model_config.vocab_size, LENGTHS[1]).tolist()
        self.times, self._chunks = HostTimes(), list[Chunk]()
        warm_steps = WARM_STEPS
        while warm_steps:
            self._step()
            warm_steps -= len(self._engine.scheduler.running) == config.max_num_seqs
        self.times = HostTimes()

    def run(self, num_steps: int) -> None:
        """Add the times of as many steps to ``times``."""
        for _ in range(num_steps):
            self._step()
            self.times.abort.append(_timed(self._engine.abort, f"host-{self._num_added - self._num_waiting // 2}"))
            self.times.add.append(_timed(self._add))
            self.times.plan.append(self._plan_seconds())

    def close(self) -> None:
        self._engine.close()

    def _step(self) -> None:
        while len(self._engine.scheduler.waiting) < self._num_waiting:
            self._add()
        self.times.step.append(_timed(self._engine.step))

    def _add(self) -> None:
        prompt, output = self._random.integers(*LENGTHS, 2).tolist()
        name = f"host-{self._num_added}"
        # The prompts begin alike, the salts let no one find another's.
        params = SamplingParams(max_tokens=output, ignore_eos=True, cache_salt=name)
        self._engine.add_request(name, self._prompt[:prompt], params)
        self._num_added += 1

    def _observe(self, step: StepRecord, chunks: list[Chunk]) -> None:
        self.times.schedule.append(step.scheduled_seconds - step.start_seconds)
        self.times.pack.append(step.launched_seconds - step.scheduled_seconds)
        self.times.process.append(step.processed_seconds - step.ready_seconds)
        self._chunks = chunks

    def _plan_seconds(self) -> float:
        limits = self._engine.runner.layout(sum(chunk.num_tokens for chunk in self._chunks)).limits
        lens = [(chunk.slot, chunk.num_tokens, chunk.start + chunk.num_tokens) for chunk in self._chunks]
        return _timed(make_plan, limits, *np.array(lens).T, new_plan(limits))


def _timed(function: Callable[..., object], *args: object) -> float:
    start = clock()
    function(*args)
    return clock() - start


def measure_host(config: EngineConfig, queues: Sequence[int], num_rounds: int, num_steps: int) -> dict[int, HostTimes]:
    """By number of waiting requests; queues of different lengths take turns, ``num_steps`` each."""
    benches = {num_waiting: HostBench(config, num_waiting) for num_waiting in queues}
    for _ in range(num_rounds):
        for bench in benches.values():
            bench.run(num_steps)
    for bench in benches.values():
        bench.close()
    return {num_waiting: bench.times for num_waiting, bench in benches.items()}
