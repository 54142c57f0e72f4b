"""What every process of a group holds: its devices' share of parameters and KV cache, and the compiled programs."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import EngineConfig, ResolvedConfig, cache_dir
from jaxserve.engine.compile import Programs, use_persistent_cache
from jaxserve.engine.memory import claim_gpu_memory
from jaxserve.engine.programs import DeviceState, StepOutputs, StepPrograms
from jaxserve.engine.sampler import TokenLogprobs
from jaxserve.engine.startup import timed
from jaxserve.engine.ticks import programs_of
from jaxserve.models.config import ModelError
from jaxserve.models.loading.checkpoint import Checkpoint, OrbaxCheckpoint, open_checkpoint
from jaxserve.models.packing import Parameter
from jaxserve.models.rope import longest_sequence


def prepare(config: EngineConfig) -> tuple[Checkpoint, ResolvedConfig]:
    """What an executor is made of, from files alone. Raises ConfigError and ModelError."""
    claim_gpu_memory(config.gpu_memory_utilization)
    use_persistent_cache(Path(config.compilation_cache or cache_dir() / "compiled"))
    checkpoint = open_checkpoint(config.model, config.load_format)
    max_len, on_gpu = longest_sequence(checkpoint.config), jax.default_backend() == "gpu"
    return checkpoint, config.resolve(model_max_len=max_len, on_gpu=on_gpu)


class Executor:
    """Runs programs on packed arrays, one after the other. Where the mesh spans several processes, each has an executor
    and all must run the same programs on the same arrays.

    ``config`` is resolved; ``num_blocks`` is the KV cache's size in blocks.
    """

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, mesh: Mesh, *, show_progress: bool) -> None:
        self.num_stages = mesh.shape["pipe"]
        if self.num_stages > 1 and isinstance(checkpoint, OrbaxCheckpoint):
            raise ModelError(
                f"{checkpoint.path}: Orbax checkpoints cannot be divided into the stages of a pipeline; "
                f"pipeline_parallel must be 1, got {self.num_stages}"
            )
        programs = programs_of(mesh)(config, checkpoint.config, mesh)
        self.model_config = programs.model_config
        abstract, weights = programs.abstract_parameters, programs.weights()
        checkpoint.check(abstract, weights)
        self.layouts = programs.layouts
        self.num_blocks = programs.num_blocks
        self.config = dataclasses.replace(config, num_blocks=self.num_blocks)
        self._replicated, self._staged = programs.replicated, programs.staged
        self._programs = Programs(
            {("step", rows): partial(programs.lower_step, rows) for rows in self.layouts}
            | {("score", rows): partial(programs.lower_score, rows) for rows in self.layouts}
        )
        self.uses_graphs = programs.uses_graphs
        kinds = ("step", "score") if self.uses_graphs else ("step",)
        ahead = [(kind, rows) for kind in kinds for rows in self.layouts] if config.warmup else []

        def load() -> list[Parameter]:
            return jax.block_until_ready(programs.take(checkpoint.load(abstract, weights)))

        def load_and_compile() -> None:
            with ThreadPoolExecutor(max_workers=1) as pool:
                loading = pool.submit(timed, load)
                if self.uses_graphs:
                    # XLA times kernels on the GPU to choose among them: not while weights come in.
                    loading.result()
                _, self.compile_seconds = timed(partial(self._programs.compile, ahead, show_progress=show_progress))
                self._parameters, self.weights_seconds = loading.result()

        _, self.loading_seconds = timed(load_and_compile)
        self._state = _new_state(programs)
        self._hidden: jax.Array | None = None

    def step(self, rows: int, ints: np.ndarray, floats: np.ndarray) -> StepOutputs:
        """Start the program of ``rows`` and return at once, while its tokens are being copied to the host.

        ints: ``int32[stages, layout.num_ints]``; floats: of the step in the last stage.
        """
        arrays = _put(ints, self._staged), _put(floats, self._replicated)
        self._state, outputs = self._programs["step", rows](self._parameters, self._state, *arrays)
        self._hidden = outputs.hidden
        outputs.tokens.copy_to_host_async()
        return outputs

    def prepare_scores(self) -> None:
        """Compile the programs of ``score`` in the background: rare, so nobody's start waits for them.

        Not on GPUs, where they have been compiled ahead: a new CUDA graph throws away those of all other programs.
        """
        if self.config.warmup and not self.uses_graphs:
            self._programs.compile_in_background([("score", rows) for rows in self.layouts])

    def can_score(self, timeout_seconds: float) -> bool:
        """Whether they are there, after waiting for at most ``timeout_seconds``; ``score`` would wait for them."""
        return self._programs.wait(timeout_seconds)

    def score(self, targets: np.ndarray) -> TokenLogprobs[jax.Array]:
        """Log-probabilities of ``targets`` ``int32[T]`` after the rows of the last step. Rare: a program of its own."""
        program = self._programs["score", len(targets)]
        return program(self._parameters, self._hidden, _put(targets, self._replicated))

    def close(self) -> None:
        """Wait for the devices and give their memory back. A step that failed may have taken the state with it."""
        for array in jax.tree.leaves((self._parameters, self._state)):
            if not array.is_deleted():
                array.block_until_ready().delete()
        self._programs.close()


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # device_put would ask all processes whether they put the same.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _new_state(programs: StepPrograms) -> DeviceState[jax.Array]:
    cache = programs.kv_cache.zeros(programs.num_blocks, programs.mesh)
    _, *others = programs.abstract_state()
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), others)
    return DeviceState(cache, *zeros)
