"""From packed steps to launches: which program runs, and the steps that a pipeline has in its stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import jax
import numpy as np

from jaxserve.engine.batch import PackedStep, StepLayout, empty_step
from jaxserve.engine.executor import Executor
from jaxserve.engine.programs import StepOutputs
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.engine.startup import timed
from jaxserve.scheduler.buckets import bucket_of

RUNS_OF_A_GRAPH = 3
"""XLA runs a program op by op at first, captures its CUDA graph the second time, and replays that from the third on."""


class ModelRunner:
    """Runs packed steps. On a mesh with several stages every launch moves the steps on by one stage."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.config, self.model_config = executor.config, executor.model_config
        self.num_stages, self.num_blocks = executor.num_stages, executor.num_blocks
        self._layouts = executor.layouts
        self.buckets = list(self._layouts)
        self.warm_up_seconds = timed(self._warm_up)[1] if self.config.warmup else 0.0
        smallest = self._layouts[self.buckets[0]]
        self._in_stages = deque([(smallest, empty_step(smallest))] * self.num_stages, maxlen=self.num_stages)
        """The steps of the last launch, by stage."""

    def layout(self, num_tokens: int) -> StepLayout:
        """The layout of the smallest program that holds ``num_tokens`` rows."""
        return self._layouts[bucket_of(num_tokens, self.buckets)]

    def launch(self, layout: StepLayout, step: PackedStep) -> StepOutputs:
        """Start a step and return at once, with the outputs of the one that leaves the last stage; its tokens are being
        copied to the host. Without a pipeline that is the step itself.
        """
        self._in_stages.appendleft((layout, step))
        return self._run(self._in_stages)

    def prepare_scores(self) -> None:
        """Compile in the background what ``score`` runs."""
        self._executor.prepare_scores()

    def can_score(self, timeout_seconds: float = 0.0) -> bool:
        """Whether ``score`` would start at once, after waiting for that for at most ``timeout_seconds``."""
        return self._executor.can_score(timeout_seconds)

    def score(self, targets: np.ndarray) -> TokenLogprobs[jax.Array]:
        """Log-probabilities of ``targets`` ``int32[T]`` after the rows of the last launch's outputs."""
        return self._executor.score(targets)

    def close(self) -> None:
        """Wait for the device and give its memory back."""
        self._executor.close()

    def _run(self, steps: Sequence[tuple[StepLayout, PackedStep]]) -> StepOutputs:
        """``steps``: one for each stage; the program of the largest bucket among them runs."""
        layout = max((layout for layout, _ in steps), key=lambda layout: layout.limits.num_rows)
        ints = np.stack([step.moved(own, layout).ints for own, step in steps])
        _, leaving = steps[-1]
        return self._executor.step(layout.limits.num_rows, ints, leaving.floats)

    def _warm_up(self) -> None:
        """Run every program on padding, so that what its first runs cost is paid before the first request.

        All have been compiled before, and none is afterwards: see ``Executor.prepare_scores``.
        """
        graphs = self._executor.uses_graphs
        for rows, layout in self._layouts.items():
            for _ in range(RUNS_OF_A_GRAPH if graphs else 1):
                jax.block_until_ready(self._run([(layout, empty_step(layout))] * self.num_stages))
                if graphs:
                    jax.block_until_ready(self.score(np.zeros(rows, np.int32)))
