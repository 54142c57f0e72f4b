"""The device side: parameters, KV cache and the compiled step programs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ResolvedConfig
from jaxserve.engine.batch import PackedStep, StepLayout, empty_step
from jaxserve.engine.compile import compile_all
from jaxserve.engine.programs import DeviceState, StepOutputs, StepPrograms
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.engine.ticks import TickPrograms
from jaxserve.models.config import ModelError
from jaxserve.models.loading.checkpoint import Checkpoint, OrbaxCheckpoint
from jaxserve.scheduler.buckets import bucket_of


class ModelRunner:
    """Runs packed steps. ``config`` is resolved; ``num_blocks`` is the KV cache's size in blocks.

    On a mesh with several stages every launch moves the steps on by one stage.
    """

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, mesh: Mesh, *, show_progress: bool) -> None:
        self.config = config
        self.num_stages = mesh.shape["pipe"]
        if self.num_stages > 1 and isinstance(checkpoint, OrbaxCheckpoint):
            raise ModelError(
                f"{checkpoint.path}: Orbax checkpoints cannot be divided into the stages of a pipeline; "
                f"pipeline_parallel must be 1, got {self.num_stages}"
            )
        programs = (TickPrograms if self.num_stages > 1 else StepPrograms)(config, checkpoint.config, mesh)
        self.model_config = programs.model_config
        abstract, weights = programs.abstract_parameters, programs.weights()
        checkpoint.check(abstract, weights)
        self.buckets = programs.buckets
        self.num_blocks = programs.num_blocks
        self._layouts = programs.layouts
        self._replicated, self._staged = programs.replicated, programs.staged
        lower = {("step", rows): partial(programs.lower_step, rows) for rows in self.buckets} | {
            ("score", rows): partial(programs.lower_score, rows) for rows in self.buckets
        }
        with ThreadPoolExecutor(max_workers=1) as pool:
            # Programs need the shapes of the weights only, so both come at once.
            loading = pool.submit(checkpoint.load, abstract, weights)
            self._programs = compile_all(lower, show_progress=show_progress)
            self._parameters = programs.take(loading.result())
        self._state = _new_state(programs.abstract_state())
        self._warm_up()
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

    def score(self, hidden: jax.Array, targets: np.ndarray) -> TokenLogprobs[jax.Array]:
        """Log-probabilities of ``targets`` ``int32[T]`` after the rows of a step; rare, so a program of its own."""
        program = self._programs["score", len(targets)]
        return program(self._parameters, hidden, jax.device_put(targets, self._replicated))

    def close(self) -> None:
        """Wait for the device and give its memory back."""
        for array in jax.tree.leaves((self._parameters, self._state)):
            array.block_until_ready().delete()
        self._programs.clear()

    def _run(self, steps: Sequence[tuple[StepLayout, PackedStep]]) -> StepOutputs:
        """``steps``: one for each stage; the program of the largest bucket among them runs."""
        layout = max((layout for layout, _ in steps), key=lambda layout: layout.limits.num_rows)
        ints = np.stack([step.moved(own, layout).ints for own, step in steps])
        _, leaving = steps[-1]
        arrays = jax.device_put((ints, leaving.floats), (self._staged, self._replicated))
        program = self._programs["step", layout.limits.num_rows]
        self._state, outputs = program(self._parameters, self._state, *arrays)
        outputs.tokens.copy_to_host_async()
        return outputs

    def _warm_up(self) -> None:
        """Run every program once on padding, so that first-run costs are paid before the first request."""
        for rows, layout in self._layouts.items():
            outputs = self._run([(layout, empty_step(layout))] * self.num_stages)
            jax.block_until_ready(self.score(outputs.hidden, np.zeros(rows, np.int32)))


def _new_state(state: DeviceState[jax.ShapeDtypeStruct]) -> DeviceState[jax.Array]:
    """Made on the device: the host may not have as much memory."""
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), state)
    return zeros._replace(cache=zeros.cache._replace(scales=jnp.ones_like(zeros.cache.scales)))
