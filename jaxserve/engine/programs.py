"""The programs of an engine: what each computes and over which shapes. Nothing here touches a device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.config import ConfigError, ResolvedConfig
from jaxserve.engine.batch import StepLayout, plan_of, step_layouts
from jaxserve.engine.compile import gpu_options
from jaxserve.engine.memory import choose_num_blocks
from jaxserve.engine.sampler import SamplingInputs, TokenLogprobs, optional_logprobs, sample, token_logprobs
from jaxserve.kernels import native
from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.cache import KVCache, KVCacheShape, stored_dtype
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.registry import choose_backend
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.packing import Parameter, abstract_packed, limited, matrices, packed
from jaxserve.models.registry import family_of
from jaxserve.models.weights import Weight
from jaxserve.sharding.rows import over_rows
from jaxserve.sharding.rules import abstract_model, abstract_parameters, divided

STAGES = PartitionSpec("pipe")
"""Of what each stage of a pipeline has its own of, along its first axis."""


class DeviceState[Array](NamedTuple):
    """What stays on the devices from one step to the next: every step takes it and gives it back."""

    cache: KVCache[Array]
    last_tokens: Array
    """``int32[S]``: what each slot sampled last."""
    activations: Array | None
    """``[stages, T of the largest bucket, hidden]``: what each stage of a pipeline has got from the one before."""


class StepOutputs(NamedTuple):
    """Results of a launched step, still on the device."""

    tokens: jax.Array
    """``int32[S]``: the sampled token of each slot that samples."""
    logprobs: TokenLogprobs[jax.Array]
    """Of the samples, S rows."""
    hidden: jax.Array
    """For ``Executor.score``: the normed hidden states of the batch's rows, ``[T, hidden_size]``; of a pipeline what
    every stage has made, ``[stages, T, hidden_size]``, not normed."""

    @property
    def num_rows(self) -> int:
        """T, of the program that ran."""
        return self.hidden.shape[-2]


class StepPrograms:
    """A step and a score program for each token bucket, of one model on one mesh.

    ``target`` and ``gpu_memory_bytes`` are of the mesh's kind of device; asked of its first one by default. Raises
    ConfigError and ModelError.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        *,
        target: Target | None = None,
        gpu_memory_bytes: int | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config = divided(model_config, mesh)
        self.mesh = mesh
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.staged = NamedSharding(mesh, STAGES)
        dtype = jnp.dtype(config.dtype)
        model_class = family_of(model_config.architecture).model
        target = target or Target.of(mesh.devices.flat[0])
        graph, state = abstract_model(model_class, model_config, max_len=config.max_model_len, dtype=dtype)
        self.abstract_parameters = self._take_apart(graph, state)
        """By path, as they are loaded, in the order in which the programs take them."""
        # Only on one device: a division of a packed matrix would have to follow its panels.
        self._packed = matrices(state) if mesh.size == 1 and native.serves(target, dtype) else {}
        self.kv_cache = KVCacheShape(
            self.num_cache_layers, model_config.num_held_kv_heads, model_config.head_dim, config.block_size,
            stored_dtype(config.kv_cache_dtype, dtype),
        )  # fmt: skip
        num_kv_heads = model_config.num_held_kv_heads // mesh.shape["tensor"]
        shape = AttentionShape(
            num_kv_heads * model_config.group_size, num_kv_heads, model_config.head_dim, config.block_size, dtype,
            self.kv_cache.dtype,
        )  # fmt: skip
        try:
            self.backend = choose_backend(config.attention_backend, target, shape)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.num_blocks = config.num_blocks or choose_num_blocks(
            config, model_config, mesh, self.kv_cache.block_bytes, self.abstract_parameters.values(), gpu_memory_bytes
        )  # fmt: skip
        self._dtype = dtype
        self._compiler_options = gpu_options(config.gemm_backend) if self.uses_graphs else None
        self.layouts = step_layouts(config, self.num_blocks, self.backend.tiling, model_config.window)
        self.buckets = tuple(self.layouts)

    @property
    def num_stages(self) -> int:
        """Of the pipeline: how many steps are at work at once, each in a stage of its own."""
        return self.mesh.shape["pipe"]

    @property
    def uses_graphs(self) -> bool:
        """Whether programs run as CUDA graphs."""
        return self.backend.target.platform == "gpu"

    @property
    def num_cache_layers(self) -> int:
        return self.model_config.num_layers

    def weights(self) -> Mapping[str, Weight]:
        """How the parameters are assembled from a checkpoint."""
        return family_of(self.model_config.architecture).weights(self.model_config)

    def take(self, parameters: Mapping[str, jax.Array]) -> list[Parameter]:
        """What the programs take, from the loaded ``parameters``; those of another layout are deleted."""
        return packed({name: parameters[name] for name in self.abstract_parameters}, self._packed)

    def abstract_state(self) -> DeviceState[jax.ShapeDtypeStruct]:
        last_tokens = jax.ShapeDtypeStruct((self.config.max_num_seqs,), jnp.int32, sharding=self.replicated)
        cache = self.kv_cache.abstract(self.num_blocks, self.mesh)
        return DeviceState(cache, last_tokens, self._abstract_activations())

    def lower_step(self, rows: int) -> jax.stages.Lowered:
        """Of parameters, the state (donated), and packed steps, for each stage its own; see StepLayout.

        The float32 array is that of the step in the last stage, which samples.
        """
        layout, state = self.layouts[rows], self.abstract_state()
        # What the next step takes as it is must come out where that expects it.
        outputs = StepOutputs(self.replicated, self.replicated, self._abstract_hidden(rows).sharding)  # type: ignore[arg-type]
        placed = (jax.tree.map(lambda array: array.sharding, state), outputs)
        step = jax.jit(
            partial(self._step, layout),
            donate_argnums=(1,),
            out_shardings=placed,
            compiler_options=self._compiler_options,
        )
        return step.lower(
            abstract_packed(self.abstract_parameters, self._packed),
            state,
            jax.ShapeDtypeStruct((self.num_stages, layout.num_ints), jnp.int32, sharding=self.staged),
            jax.ShapeDtypeStruct(layout.float_shape, jnp.float32, sharding=self.replicated),
        )

    def lower_score(self, rows: int) -> jax.stages.Lowered:
        """Of parameters, a step's hidden states and target tokens ``int32[rows]``."""
        targets = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self.replicated)
        parameters = abstract_packed(self.abstract_parameters, self._packed)
        score = jax.jit(self._score, compiler_options=self._compiler_options)
        return score.lower(parameters, self._abstract_hidden(rows), targets)

    def _take_apart(self, graph: nnx.GraphDef, state: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
        """The model's parameters as the programs take them."""
        self._graph, self._state_tree = graph, jax.tree.structure(state)
        return abstract_parameters(state, self.mesh)

    def _abstract_activations(self) -> jax.ShapeDtypeStruct | None:
        return None

    def _abstract_hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, self.model_config.hidden_size), self._dtype, sharding=self.replicated)

    def _model(self, parameters: list[Parameter]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._state_tree, parameters))

    def _step(
        self,
        layout: StepLayout,
        parameters: list[Parameter],
        state: DeviceState[jax.Array],
        ints: jax.Array,
        floats: jax.Array,
    ) -> tuple[DeviceState[jax.Array], StepOutputs]:
        """The program of one step; see StepLayout for the fields."""
        fields = layout.split(ints[0])
        model = self._model(self._limited(parameters, fields))
        token_ids = fed_back(fields, state.last_tokens)
        inputs = self._attention_inputs(layout, fields, self.mesh)
        hidden, cache = model(token_ids, fields["positions"], state.cache, inputs)
        logits = model.logits(hidden, fields["sample_rows"])
        tokens, logprobs, last_tokens = sample_step(logits, fields, floats, state.last_tokens, self.mesh)
        return DeviceState(cache, last_tokens, None), StepOutputs(tokens, logprobs, hidden)

    def _limited(self, parameters: list[Parameter], fields: dict[str, jax.Array]) -> list[Parameter]:
        """Where native kernels do all work on padding rows, they leave it: nothing that counts reads those rows."""
        if not self.backend.skips_padding:
            return parameters
        slots = fields["kv_slots"]
        is_token = slots >= self.config.block_size  # others write to the dummy page
        return limited(parameters, jnp.where(is_token, jnp.arange(len(slots), dtype=jnp.int32), -1))

    def _attention_inputs(
        self, layout: StepLayout, fields: dict[str, jax.Array], mesh: Mesh | AbstractMesh
    ) -> AttentionInputs:
        return AttentionInputs(
            fields["kv_slots"], fields["block_tables"], plan_of(fields), layout.limits, self.backend, mesh
        )

    def _score(self, parameters: list[Parameter], hidden: jax.Array, targets: jax.Array) -> TokenLogprobs[jax.Array]:
        return over_rows(token_logprobs, self.mesh, self._model(parameters).logits(hidden), targets)


def fed_back(fields: dict[str, jax.Array], last_tokens: jax.Array) -> jax.Array:
    """The rows' token ids ``int32[T]``, those that the host has not seen yet from the device's own samples."""
    feedback = fields["feedback"]
    return jnp.where(feedback >= 0, last_tokens[feedback], fields["token_ids"])


def sample_step(
    logits: jax.Array, fields: dict[str, jax.Array], floats: jax.Array, last_tokens: jax.Array, mesh: Mesh
) -> tuple[jax.Array, TokenLogprobs[jax.Array], jax.Array]:
    """Of ``float32[S, vocab]``: tokens ``int32[S]``, their logprobs where they are asked for, the new last tokens."""
    temperature, top_p, min_p = floats
    sampling = SamplingInputs(temperature, top_p, min_p, fields["top_k"], fields["seeds"], fields["sample_positions"])
    wanted = fields["want_logprobs"][0] > 0

    def sample_rows(logits: jax.Array, inputs: SamplingInputs) -> tuple[jax.Array, TokenLogprobs[jax.Array]]:
        tokens = sample(logits, inputs)
        return tokens, optional_logprobs(wanted, logits, tokens)

    tokens, logprobs = over_rows(sample_rows, mesh, logits, sampling)
    return tokens, logprobs, jnp.where(fields["sample_rows"] >= 0, tokens, last_tokens)
