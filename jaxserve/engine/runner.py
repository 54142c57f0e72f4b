"""The device side: parameters, KV cache and the compiled step programs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ResolvedConfig
from jaxserve.engine.batch import PackedStep, StepLayout, empty_step
from jaxserve.engine.compile import compile_all
from jaxserve.engine.programs import StepOutputs, StepPrograms
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.kernels.attention import KVCache
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.models.registry import family_of
from jaxserve.scheduler.buckets import bucket_of


class ModelRunner:
    """Runs packed steps. ``config`` is resolved; ``num_blocks`` is the KV cache's size in blocks."""

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, mesh: Mesh, *, show_progress: bool) -> None:
        self.config = config
        programs = StepPrograms(config, checkpoint.config, mesh)
        self.model_config = programs.model_config
        abstract = programs.abstract_parameters
        weights = family_of(self.model_config.architecture).weights(self.model_config)
        checkpoint.check(abstract, weights)
        self.buckets = programs.buckets
        self.num_blocks = programs.num_blocks
        self._layouts = programs.layouts
        self._replicated = programs.replicated
        lower = {("step", rows): partial(programs.lower_step, rows) for rows in self.buckets} | {
            ("score", rows): partial(programs.lower_score, rows) for rows in self.buckets
        }
        with ThreadPoolExecutor(max_workers=1) as pool:
            # Programs need the shapes of the weights only, so both come at once.
            loading = pool.submit(checkpoint.load, abstract, weights)
            self._programs = compile_all(lower, show_progress=show_progress)
            parameters = loading.result()
        self._parameters = [parameters[name] for name in abstract]
        self._cache = _new_cache(programs.abstract_cache())
        self._last_tokens = jax.device_put(np.zeros(config.max_num_seqs, np.int32), self._replicated)
        self._warm_up()

    def layout(self, num_tokens: int) -> StepLayout:
        """The layout of the smallest program that holds ``num_tokens`` rows."""
        return self._layouts[bucket_of(num_tokens, self.buckets)]

    def launch(self, layout: StepLayout, step: PackedStep) -> StepOutputs:
        """Start a step and return at once; its tokens are being copied to the host."""
        ints, floats = jax.device_put((step.ints, step.floats), self._replicated)
        program = self._programs["step", layout.limits.num_rows]
        self._cache, self._last_tokens, outputs = program(
            self._parameters, self._cache, self._last_tokens, ints, floats
        )
        outputs.tokens.copy_to_host_async()
        return outputs

    def score(self, hidden: jax.Array, targets: np.ndarray) -> TokenLogprobs[jax.Array]:
        """Log-probabilities of ``targets`` ``int32[T]`` after the rows of a step; rare, so a program of its own."""
        program = self._programs["score", len(targets)]
        return program(self._parameters, hidden, jax.device_put(targets, self._replicated))

    def close(self) -> None:
        """Wait for the device and give its memory back."""
        for array in jax.tree.leaves((self._parameters, self._cache, self._last_tokens)):
            array.block_until_ready().delete()
        self._programs.clear()

    def _warm_up(self) -> None:
        """Run every program once on padding, so that first-run costs are paid before the first request."""
        for rows, layout in self._layouts.items():
            step = empty_step(layout)
            outputs = self.launch(layout, step)
            jax.block_until_ready(self.score(outputs.hidden, np.zeros(rows, np.int32)))


def _new_cache(cache: KVCache[jax.ShapeDtypeStruct]) -> KVCache[jax.Array]:
    """Made on the device: the host may not have as much memory."""
    k, v = (jnp.zeros(pages.shape, pages.dtype, device=pages.sharding) for pages in cache[:2])
    return KVCache(k, v, jnp.ones(cache.scales.shape, device=cache.scales.sharding))
