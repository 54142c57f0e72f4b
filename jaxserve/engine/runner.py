"""The device side: parameters, KV cache and the compiled step programs."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ConfigError, ResolvedConfig
from jaxserve.engine.batch import PackedStep, StepLayout, empty_step, plan_of
from jaxserve.engine.compile import compile_all
from jaxserve.engine.sampler import SamplingInputs, TokenLogprobs, optional_logprobs, sample, token_logprobs
from jaxserve.kernels.attention import AttentionInputs, KVCache, choose_backend
from jaxserve.kernels.plan import PlanLimits
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.models.registry import family_of
from jaxserve.scheduler.buckets import bucket_of, token_buckets
from jaxserve.sharding.rules import abstract_model, abstract_parameters

CPU_KV_CACHE_BYTES = 2**30
"""What the KV cache takes on a CPU when num_blocks is not given."""


class StepOutputs(NamedTuple):
    """Results of a launched step, still on the device."""

    tokens: jax.Array
    """``int32[S]``: the sampled token of each slot that samples."""
    logprobs: TokenLogprobs[jax.Array]
    """Of the samples, S rows."""
    hidden: jax.Array
    """``[T, hidden_size]``: the normed hidden states of the batch's rows, for ``ModelRunner.score``."""


class ModelRunner:
    """Runs packed steps. ``config`` is resolved; ``num_blocks`` is the KV cache's size in blocks."""

    def __init__(self, config: ResolvedConfig, checkpoint: Checkpoint, mesh: Mesh, *, show_progress: bool) -> None:
        self.config = config
        self.model_config: ModelConfig = checkpoint.config
        self.buckets = token_buckets(config.token_budget)
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._mesh = mesh
        family = family_of(checkpoint.config.architecture)
        dtype = jnp.dtype(config.dtype)
        self._graph, state = abstract_model(family.model, checkpoint.config, max_len=config.max_model_len, dtype=dtype)
        self._state_tree = jax.tree.structure(state)
        abstract = abstract_parameters(state, mesh)
        self._abstract_parameters = list(abstract.values())
        try:
            self._backend = choose_backend(config.attention_backend, mesh.devices.flat[0].platform, dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        weights = family.weights(checkpoint.config)
        checkpoint.check(abstract, weights)
        self.num_blocks = self._choose_num_blocks(dtype)
        self._layouts = {rows: self._layout(rows) for rows in self.buckets}
        lower = {("step", rows): partial(self._lower_step, rows) for rows in self.buckets} | {
            ("score", rows): partial(self._lower_score, rows) for rows in self.buckets
        }
        with ThreadPoolExecutor(max_workers=1) as pool:
            # Programs need the shapes of the weights only, so both come at once.
            loading = pool.submit(checkpoint.load, abstract, weights)
            self._programs = compile_all(lower, show_progress=show_progress)
            parameters = loading.result()
        self._parameters = [parameters[name] for name in abstract]
        cache = self._abstract_cache()
        self._cache = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), cache)
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

    def _layout(self, rows: int) -> StepLayout:
        config, window = self.config, self.model_config.window
        return StepLayout(
            PlanLimits(rows, config.max_num_seqs, config.max_model_len, config.block_size, self.num_blocks, window)
        )

    def _abstract_cache(self) -> KVCache[jax.ShapeDtypeStruct]:
        model, config = self.model_config, self.config
        shape = (model.num_layers * self.num_blocks, config.block_size, model.num_kv_heads, model.head_dim)
        sharding = NamedSharding(self._mesh, PartitionSpec(None, None, "tensor", None))
        pages = jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=sharding)
        return KVCache(pages, pages)

    def _choose_num_blocks(self, dtype: np.dtype) -> int:
        """The configured number, or what the memory that is left holds, at most what all sequences can use."""
        model, config = self.model_config, self.config
        if config.num_blocks is not None:
            return config.num_blocks
        per_block = 2 * model.num_layers * config.block_size * model.num_kv_heads * model.head_dim * dtype.itemsize
        blocks_per_seq = -(-config.max_model_len // config.block_size)
        device = self._mesh.devices.flat[0]
        if device.platform == "cpu":
            memory_bytes = max(CPU_KV_CACHE_BYTES, (1 + blocks_per_seq) * per_block)
        else:
            weight_bytes = sum(
                math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize for p in self._abstract_parameters
            )
            limit_bytes = int(device.memory_stats()["bytes_limit"] * config.gpu_memory_utilization)
            memory_bytes = (limit_bytes - weight_bytes) * self._mesh.shape["tensor"]
        num_blocks = min(memory_bytes // per_block, 1 + config.max_num_seqs * blocks_per_seq)
        if num_blocks < 1 + blocks_per_seq:
            raise ConfigError(
                f"max_model_len {config.max_model_len} needs {(1 + blocks_per_seq) * per_block} bytes of KV cache, "
                f"the device has {memory_bytes} left"
            )
        return num_blocks

    def _model(self, parameters: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._state_tree, parameters))

    def _lower_step(self, rows: int) -> jax.stages.Lowered:
        layout = self._layouts[rows]
        abstract = partial(jax.ShapeDtypeStruct, sharding=self._replicated)
        return jax.jit(partial(self._step, layout), donate_argnums=(1, 2)).lower(
            self._abstract_parameters,
            self._abstract_cache(),
            abstract((self.config.max_num_seqs,), jnp.int32),
            abstract((layout.num_ints,), jnp.int32),
            abstract(layout.float_shape, jnp.float32),
        )

    def _lower_score(self, rows: int) -> jax.stages.Lowered:
        abstract = partial(jax.ShapeDtypeStruct, sharding=self._replicated)
        hidden = abstract((rows, self.model_config.hidden_size), jnp.dtype(self.config.dtype))
        return jax.jit(self._score).lower(self._abstract_parameters, hidden, abstract((rows,), jnp.int32))

    def _step(
        self,
        layout: StepLayout,
        parameters: list[jax.Array],
        cache: KVCache[jax.Array],
        last_tokens: jax.Array,
        ints: jax.Array,
        floats: jax.Array,
    ) -> tuple[KVCache[jax.Array], jax.Array, StepOutputs]:
        """The program of one step; see StepLayout for the fields."""
        model = self._model(parameters)
        fields = layout.split(ints)
        feedback = fields["feedback"]
        token_ids = jnp.where(feedback >= 0, last_tokens[feedback], fields["token_ids"])
        inputs = AttentionInputs(
            fields["kv_slots"], fields["block_tables"], plan_of(fields), self.num_blocks, self._backend
        )
        hidden, cache = model(token_ids, fields["positions"], cache, inputs)

        sample_rows = fields["sample_rows"]
        logits = model.logits(hidden[sample_rows])
        temperature, top_p, min_p = floats
        sampling = SamplingInputs(
            temperature, top_p, min_p, fields["top_k"], fields["seeds"], fields["sample_positions"]
        )
        tokens = sample(logits, sampling)
        logprobs = optional_logprobs(fields["want_logprobs"][0] > 0, logits, tokens)
        last_tokens = jnp.where(sample_rows >= 0, tokens, last_tokens)
        return cache, last_tokens, StepOutputs(tokens, logprobs, hidden)

    def _score(self, parameters: list[jax.Array], hidden: jax.Array, targets: jax.Array) -> TokenLogprobs[jax.Array]:
        return token_logprobs(self._model(parameters).logits(hidden), targets)

    def _warm_up(self) -> None:
        """Run every program once on padding, so that first-run costs are paid before the first request."""
        for rows, layout in self._layouts.items():
            step = empty_step(layout)
            outputs = self.launch(layout, step)
            jax.block_until_ready(self.score(outputs.hidden, np.zeros(rows, np.int32)))
