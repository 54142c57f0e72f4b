"""The programs of an engine: what each computes and over which shapes. Nothing here touches a device."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ConfigError, ResolvedConfig
from jaxserve.engine.batch import StepLayout, plan_of
from jaxserve.engine.memory import choose_num_blocks
from jaxserve.engine.sampler import SamplingInputs, TokenLogprobs, optional_logprobs, sample, token_logprobs
from jaxserve.kernels.attention import CACHE, AttentionInputs, KVCache
from jaxserve.kernels.backend import AttentionShape, Target, choose_backend
from jaxserve.kernels.plan import PlanLimits
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import family_of
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.sharding.rules import abstract_model, abstract_parameters, hold_kv_heads

GRAPH_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
"""XLA's default and WHILE: without it the sampler's loop stays out of the step's CUDA graph and its branches with it,
and at each branch the host waits for the device."""


class StepOutputs(NamedTuple):
    """Results of a launched step, still on the device."""

    tokens: jax.Array
    """``int32[S]``: the sampled token of each slot that samples."""
    logprobs: TokenLogprobs[jax.Array]
    """Of the samples, S rows."""
    hidden: jax.Array
    """``[T, hidden_size]``: the normed hidden states of the batch's rows, for ``ModelRunner.score``."""


class StepPrograms:
    """A step and a score program for each token bucket, of one model on one mesh.

    ``target``: the mesh's kind of device; asked of its first one by default. Raises ConfigError and ModelError.
    """

    def __init__(
        self, config: ResolvedConfig, model_config: ModelConfig, mesh: Mesh, *, target: Target | None = None
    ) -> None:
        self.config = config
        self.model_config = model_config = hold_kv_heads(model_config, mesh)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._mesh = mesh
        self._cache_shardings = jax.tree.map(partial(NamedSharding, mesh), CACHE)
        dtype = jnp.dtype(config.dtype)
        model_class = family_of(model_config.architecture).model
        self._graph, state = abstract_model(model_class, model_config, max_len=config.max_model_len, dtype=dtype)
        self._state_tree = jax.tree.structure(state)
        self.abstract_parameters = abstract_parameters(state, mesh)
        """By path, in the order in which the programs take them."""
        cache_dtype = jnp.dtype(jnp.float8_e4m3fn) if config.kv_cache_dtype == "fp8_e4m3" else dtype
        num_kv_heads = model_config.num_held_kv_heads // mesh.shape["tensor"]
        shape = AttentionShape(
            num_kv_heads * model_config.group_size, num_kv_heads, model_config.head_dim, config.block_size, dtype,
            cache_dtype,
        )  # fmt: skip
        try:
            self.backend = choose_backend(config.attention_backend, target or Target.of(mesh.devices.flat[0]), shape)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.num_blocks = config.num_blocks or choose_num_blocks(
            config, model_config, mesh, cache_dtype, self.abstract_parameters.values()
        )
        self._cache_dtype = cache_dtype
        self.buckets = token_buckets(config.token_budget)
        self.layouts = {rows: self._layout(rows) for rows in self.buckets}

    def abstract_cache(self) -> KVCache[jax.ShapeDtypeStruct]:
        model, config = self.model_config, self.config
        shape = (model.num_layers * self.num_blocks, config.block_size, model.num_held_kv_heads, model.head_dim)
        k, v, scales = self._cache_shardings
        return KVCache(
            jax.ShapeDtypeStruct(shape, self._cache_dtype, sharding=k),
            jax.ShapeDtypeStruct(shape, self._cache_dtype, sharding=v),
            jax.ShapeDtypeStruct((model.num_layers, 2), jnp.float32, sharding=scales),
        )

    def lower_step(self, rows: int) -> jax.stages.Lowered:
        """Of parameters, cache, last tokens ``int32[S]`` (both donated) and a packed step; see StepLayout."""
        layout = self.layouts[rows]
        abstract = partial(jax.ShapeDtypeStruct, sharding=self.replicated)
        # What the next step takes as it is must come out where that expects it.
        placed = (self._cache_shardings, self.replicated, self.replicated)
        step = jax.jit(
            partial(self._step, layout),
            donate_argnums=(1, 2),
            out_shardings=placed,
            compiler_options=GRAPH_OPTIONS if self.backend.target.platform == "gpu" else None,
        )
        return step.lower(
            list(self.abstract_parameters.values()),
            self.abstract_cache(),
            abstract((self.config.max_num_seqs,), jnp.int32),
            abstract((layout.num_ints,), jnp.int32),
            abstract(layout.float_shape, jnp.float32),
        )

    def lower_score(self, rows: int) -> jax.stages.Lowered:
        """Of parameters, a step's hidden states and target tokens ``int32[rows]``."""
        abstract = partial(jax.ShapeDtypeStruct, sharding=self.replicated)
        hidden = abstract((rows, self.model_config.hidden_size), jnp.dtype(self.config.dtype))
        parameters = list(self.abstract_parameters.values())
        return jax.jit(self._score).lower(parameters, hidden, abstract((rows,), jnp.int32))

    def _layout(self, rows: int) -> StepLayout:
        config = self.config
        return StepLayout(
            PlanLimits(
                rows, config.max_num_seqs, config.max_model_len, config.block_size, self.num_blocks,
                self.backend.tiling, self.model_config.window,
            )
        )  # fmt: skip

    def _model(self, parameters: list[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._state_tree, parameters))

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
            fields["kv_slots"], fields["block_tables"], plan_of(fields), self.num_blocks, self.backend, self._mesh
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
