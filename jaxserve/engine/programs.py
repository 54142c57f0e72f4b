"""The programs of an engine: what each computes and over which shapes. Nothing here runs one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import ResolvedConfig
from jaxserve.engine.coded import CodedMatrices
from jaxserve.engine.compile import gpu_options
from jaxserve.engine.forward import (
    EVERYWHERE,
    STAGES,
    Drawn,
    Forward,
    ModelState,
    StagedForward,
    WholeForward,
)
from jaxserve.engine.logits import EditLayout, edited
from jaxserve.engine.memory import choose_num_blocks
from jaxserve.engine.sampler import SamplingInputs, TokenLogprobs, optional_logprobs, sample, token_logprobs
from jaxserve.engine.speculation import (
    PROPOSERS,
    Draws,
    SequenceState,
    draw_places,
    most_suggested,
    suggested,
    verify,
    with_drafts,
)
from jaxserve.engine.step import StepLayout, StepOutputs, step_layouts
from jaxserve.errors import ConfigError
from jaxserve.kernels import native
from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.cache import is_quantised, stored_dtype
from jaxserve.kernels.registry import choose_backend
from jaxserve.models.config import Memory, ModelConfig
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.models.matrix import (
    Matrix,
    MatrixLayout,
    Parameter,
    QuantisedMatrix,
    abstract_taken,
    choose_kind,
    layouts_of,
    taken,
)
from jaxserve.models.memory import cache_shape
from jaxserve.models.registry import family_of
from jaxserve.models.weights import Weight
from jaxserve.sharding.rows import over_rows
from jaxserve.sharding.rules import abstract_model, abstract_parameters, divided

logger = logging.getLogger(__name__)

SWAP_BLOCKS = 8
"""Blocks that are copied at once between the KV cache and the host's memory."""

AbstractParameter = jax.ShapeDtypeStruct | Matrix
PlanCodes = Callable[
    [Mapping[str, jax.ShapeDtypeStruct], Mapping[str, Weight], Mapping[str, MatrixLayout]], dict[str, QuantisedMatrix]
]


class StepPrograms:
    """The programs of one model on one mesh: a step is a forward pass of its token bucket, then, where the batch draws,
    sampling of as many draws. ``admit`` begins the history of a sequence, ``score`` is for prompt logprobs.

    ``beside``: of another model, which keeps its parameters, and KV in as many blocks, in the same memory.
    ``plan_codes``: says which matrices may stay codes in memory, as Checkpoint.planned_codes does; none by default.
    ``probes``: ``[num_probes, hidden]``, what the model has besides (models/loading/probes.py).
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
        beside: StepPrograms | None = None,
        plan_codes: PlanCodes | None = None,
        probes: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self._added = {} if probes is None else {"probes": probes}
        model_config = replace(model_config, num_probes=0 if probes is None else len(probes))
        self.model_config = model_config = divided(model_config, mesh, expert_parallel=config.enable_expert_parallel)
        self.mesh = mesh
        self.replicated, self.staged = NamedSharding(mesh, EVERYWHERE), NamedSharding(mesh, STAGES)
        dtype = jnp.dtype(config.dtype)
        target = target or Target.of(mesh.devices.flat[0])
        cache_dtype = stored_dtype(config.kv_cache_dtype, dtype)
        shapes = [
            AttentionShape(
                kind.num_heads // mesh.shape["tensor"], kind.num_held_kv_heads // mesh.shape["tensor"], kind.head_dim,
                config.block_size, dtype, cache_dtype, kind.has_values,
            )
            for kind in (model_config, model_config.of_kind(local=True))
        ]  # fmt: skip
        try:
            self.backend = choose_backend(config.attention_backend, target, *shapes)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        family = family_of(model_config.architecture)
        graph, state = abstract_model(family.model, model_config, max_len=config.max_model_len, dtype=dtype)
        self._matrices, is_native = layouts_of(state), mesh.size == 1 and native.serves(target, dtype)
        self._kind = choose_kind(target, dtype, mesh)

        def planned(plan_codes: PlanCodes) -> dict[str, QuantisedMatrix]:
            stored = self._without_added(abstract_parameters(state, mesh))
            return plan_codes(stored, family.weights(model_config), self._matrices)

        plan = partial(planned, plan_codes) if plan_codes is not None and self.num_stages == 1 else None
        self._codes = CodedMatrices(config, target, is_native, plan)
        self.forward: Forward
        self.skips_padding = (
            self.num_stages == 1
            and self.backend.skips_padding
            and self._kind.skips_padding
            and self._codes.skip_padding
        )
        """Whether padding costs nothing, so that a step takes what its tokens do."""
        if self.num_stages == 1:
            self.forward = WholeForward(graph, state, mesh, model_config, self.backend, self.skips_padding)
        else:
            self.forward = StagedForward(graph, state, mesh, model_config, self.backend)
        everything = self.forward.abstract_parameters
        self._stored = self._without_added(everything)
        coded = self._codes.names
        self.abstract_parameters = {name: spec for name, spec in self._stored.items() if name not in coded}
        """Those that are loaded dense; see ``load``."""
        if coded:
            others = ", ".join(name for name in self._matrices if name not in coded) or "none"
            logger.info("%d of %d matrices are kept as codes; dequantised: %s", len(coded), len(self._matrices), others)
        dense = abstract_taken(self.abstract_parameters, self._matrices, self._kind)
        everything_taken: dict[str, AbstractParameter] = {**everything, **dense, **self._codes.abstract()}
        self._abstract_taken = self._in_order(everything_taken)
        self.kv_cache = cache_shape(
            model_config, self.forward.kept, page_size=config.block_size, num_slots=config.max_num_seqs, dtype=dtype,
            cache_dtype=cache_dtype,
        )  # fmt: skip
        block_bytes = self.kv_cache.block_bytes
        arrays = jax.tree.leaves(self._abstract_taken) + self.kv_cache.besides_pages(mesh)
        if beside is not None:
            block_bytes += beside.kv_cache.block_bytes
            arrays += jax.tree.leaves(beside._abstract_taken)
        self.num_blocks = config.num_blocks or choose_num_blocks(
            config, model_config, mesh, block_bytes, arrays, gpu_memory_bytes
        )
        self._options = gpu_options(config.gemm_backend) if self.uses_graphs else None
        self.layouts = step_layouts(config, self.num_blocks, self.backend.tiling, model_config.window)
        self.buckets = tuple(self.layouts)
        self.edits = EditLayout(model_config.vocab_size)
        self.num_logprobs = config.num_logprobs(model_config.vocab_size)
        """Alternatives of a draw or a prompt's token."""
        self.draw_layouts = {layout.num_draws: layout for layout in self.layouts.values()}
        """By number of draws, a layout that has as many."""

    @property
    def num_stages(self) -> int:
        """Of the pipeline: how many steps are at work at once, each in a stage of its own."""
        return self.mesh.shape["pipe"]

    @property
    def uses_graphs(self) -> bool:
        """Whether programs run as CUDA graphs."""
        return self.backend.target.platform == "gpu"

    def weights(self) -> Mapping[str, Weight]:
        """How the parameters are assembled from a checkpoint."""
        return self.forward.assembled(family_of(self.model_config.architecture).weights(self.model_config))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ModelError where a checkpoint does not fit; see Checkpoint.check."""
        checkpoint.check(self._stored, self.weights())

    def load(self, checkpoint: Checkpoint) -> list[Parameter]:
        """What the programs take, on the devices, from a checkpoint that fits. Raises ModelError."""
        weights = self.weights()
        dense = taken(checkpoint.load(self.abstract_parameters, weights), self._matrices, self._kind)
        everything = self.forward.abstract_parameters
        added = {name: _placed(array, everything[name]) for name, array in self._added.items()}
        parameters: dict[str, Parameter] = {**dense, **dict(self._codes.load(checkpoint, weights)), **added}
        return jax.block_until_ready(self._in_order(parameters))

    def _without_added[P](self, parameters: Mapping[str, P]) -> dict[str, P]:
        """Those that a checkpoint has."""
        return {name: value for name, value in parameters.items() if name not in self._added}

    def _in_order[P](self, parameters: Mapping[str, P]) -> list[P]:
        return [parameters[name] for name in self.forward.abstract_parameters]

    def abstract_state(self) -> ModelState[jax.ShapeDtypeStruct]:
        cache = self.kv_cache.abstract(self.num_blocks, self.mesh)
        return ModelState(cache, self.forward.abstract_activations(self.buckets[-1]))

    def new_state(self, kv_scales: np.ndarray | None = None) -> ModelState[jax.Array]:
        """kv_scales: ``float32[layers, 2]``, see KVCache.scales; used where that is quantised, 1 by default."""
        activations = self.abstract_state().activations
        if is_quantised(self.kv_cache.dtype) and kv_scales is None:
            logger.warning(
                "kv_cache_dtype %s: the checkpoint has no scales for keys and values; without, they are less precise",
                self.config.kv_cache_dtype,
            )
        parts = (self.forward.kept[memory] for memory in (Memory.PAGES, Memory.LOCAL_PAGES))
        scales = [] if kv_scales is None else [kv_scales[list(layers)] for layers in parts]
        cache = self.kv_cache.zeros(self.num_blocks, self.mesh, scales)
        return ModelState(cache, None if activations is None else zeros(activations))

    def new_sequences(self) -> SequenceState[jax.Array]:
        return jax.tree.map(zeros, self.abstract_sequences())

    def abstract_sequences(self) -> SequenceState[jax.ShapeDtypeStruct]:
        slots, longest = self.config.max_num_seqs, self.config.max_model_len
        num_drafts = self._ints(slots) if self.config.max_seq_drafts else None
        return SequenceState(self._ints(slots, longest), self._ints(slots), num_drafts)

    def lower_forward(self, rows: int) -> jax.stages.Lowered:
        """Of parameters, the model's state (donated), the sequences' and packed steps, for each stage its own."""
        layout, state = self.layouts[rows], self.abstract_state()
        # What the next step takes as it is must come out where that expects it.
        drawn = Drawn(self.replicated, self.replicated, self.forward.abstract_hidden(rows).sharding)  # type: ignore[arg-type]
        placed = (jax.tree.map(lambda array: array.sharding, state), drawn)
        ints = jax.ShapeDtypeStruct((self.num_stages, layout.num_ints), jnp.int32, sharding=self.staged)
        arguments = self._abstract_taken, state, self.abstract_sequences(), ints
        return self._lower(partial(self.forward, layout), *arguments, donate_argnums=1, out_shardings=placed)

    def lower_sample(self, num_draws: int) -> jax.stages.Lowered:
        """Of the parameters outside the layers, the sequences' state (donated), and ``Drawn.rows`` and ``draws``."""
        return self._lower_sample(num_draws)

    def lower_sample_edited(self, num_draws: int) -> jax.stages.Lowered:
        """The same, and of ``int32[num_draws, edits.width]``."""
        return self._lower_sample(num_draws, self._ints(num_draws, self.edits.width))

    def _lower_sample(self, num_draws: int, *edits: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        layout, hidden = self.draw_layouts[num_draws], self.forward.abstract_hidden(num_draws)
        rows = jax.ShapeDtypeStruct(hidden.shape[-2:], hidden.dtype, sharding=self.replicated)
        draws = self._ints(layout.num_draw_ints)
        arguments = self._abstract_outside(), self.abstract_sequences(), rows, draws, *edits
        return self._lower(partial(self._sample, layout), *arguments, donate_argnums=1, out_shardings=self.replicated)

    def lower_admit(self) -> jax.stages.Lowered:
        """Of the sequences' state (donated) and ``int32[2 + max_model_len]``: slot, number of tokens, tokens."""
        arguments = self.abstract_sequences(), self._ints(2 + self.config.max_model_len)
        return self._lower(_admit, *arguments, donate_argnums=0, out_shardings=self.replicated)

    def lower_suggest(self) -> jax.stages.Lowered:
        """Of the sequences' state (donated) and ``int32[max_num_seqs, 2 + N]``, what the host suggests to them."""
        most = self.config.max_seq_drafts
        arguments = self.abstract_sequences(), self._ints(self.config.max_num_seqs, 2 + most_suggested(most))
        return self._lower(partial(suggested, most), *arguments, donate_argnums=0, out_shardings=self.replicated)

    def lower_score(self, rows: int) -> jax.stages.Lowered:
        """Of the parameters outside the layers, a step's hidden states and ``wanted_scores``, ``int32[1 + rows]``."""
        hidden = self.forward.abstract_hidden(rows)
        return self._lower(self._score, self._abstract_outside(), hidden, self._ints(1 + rows))

    def lower_swap_out(self) -> jax.stages.Lowered:
        """Of the KV cache and ``int32[SWAP_BLOCKS]``, numbers of blocks, whose contents come out."""
        blocks = jax.tree.map(lambda array: array.sharding, [self.abstract_block] * SWAP_BLOCKS)
        arguments = self.abstract_state().cache, self._ints(SWAP_BLOCKS)
        return self._lower(self.kv_cache.blocks_of, *arguments, out_shardings=blocks)

    def lower_swap_in(self) -> jax.stages.Lowered:
        """Of the KV cache (donated), ``int32[SWAP_BLOCKS]`` and as many blocks' contents."""
        cache = self.abstract_state().cache
        arguments = cache, self._ints(SWAP_BLOCKS), [self.abstract_block] * SWAP_BLOCKS
        placed = jax.tree.map(lambda array: array.sharding, cache)
        return self._lower(self.kv_cache.with_blocks, *arguments, donate_argnums=0, out_shardings=placed)

    @property
    def abstract_block(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of a Block of the KV cache."""
        return self.kv_cache.abstract_block(self.mesh)

    def lower_with_parameters(self, function: Callable[..., object], *arguments: object) -> jax.stages.Lowered:
        """A function of all parameters, the model's state and the sequences' (both donated) and other arguments, which
        gives both states."""
        state = self.abstract_state()
        placed = jax.tree.map(lambda array: array.sharding, state), self.replicated
        return self._lower(
            function, self._abstract_taken, state, *arguments, donate_argnums=(1, 2), out_shardings=placed
        )

    def _lower(self, function: Callable[..., object], *arguments: object, **options: Any) -> jax.stages.Lowered:
        jitted = jax.jit(function, compiler_options=self._options, **options)
        lowered = jitted.lower(*arguments)
        jitted.clear_cache()  # type: ignore[attr-defined]  # what jax keeps of it would outlive the engine
        return lowered

    def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.replicated)

    def _abstract_outside(self) -> list[AbstractParameter]:
        return self.forward.outside(self._abstract_taken)

    def _sample(
        self,
        layout: StepLayout,
        outside: list[Parameter],
        sequences: SequenceState[jax.Array],
        rows: jax.Array,
        draws: jax.Array,
        edits: jax.Array | None = None,
    ) -> tuple[SequenceState[jax.Array], StepOutputs]:
        fields = layout.split_draws(draws)
        is_draw, seqs, positions = fields["draw_rows"] >= 0, fields["draw_seqs"], fields["draw_positions"]
        if sequences.num_drafts is not None:
            offsets, positions = draw_places(positions, sequences.lengths[seqs])
            is_draw &= offsets <= sequences.num_drafts[seqs]
        wanted_rows = jnp.where(is_draw, jnp.arange(layout.num_draws, dtype=jnp.int32), -1)
        logits = self.forward.head(outside).logits(rows, wanted_rows)
        wanted = fields["want_logprobs"][0] > 0

        def sample_rows(logits: jax.Array, inputs: SamplingInputs, *edits: jax.Array) -> StepOutputs:
            changed = logits
            if edits:
                packed, history = edits
                changed = edited(logits, self.edits.split(packed), history, inputs.draw_positions)
            tokens = sample(changed, inputs)
            return StepOutputs(tokens, optional_logprobs(wanted, self.num_logprobs, logits, tokens))

        fields["draw_positions"] = positions
        inputs = SamplingInputs(*(fields[name] for name in SamplingInputs._fields))
        # Slots that do not exist are dropped.
        slots = jnp.where(is_draw, seqs, self.config.max_num_seqs)
        changes = () if edits is None else (edits, sequences.history[slots])
        outputs = over_rows(sample_rows, self.mesh, logits, inputs, *changes)
        if sequences.num_drafts is not None:
            drawn = Draws(slots, offsets, positions, sequences.history[seqs, positions - 1], outputs.tokens)
            known, tokens = verify(sequences, drawn)
            if (propose := PROPOSERS.get(self.config.speculative)) is not None:
                has_drawn = jnp.zeros_like(known.lengths, bool).at[slots].set(True, mode="drop")
                known = with_drafts(known, propose(known, self.config.max_seq_drafts, drawn), has_drawn)
            return known, outputs._replace(tokens=tokens)
        history = sequences.history.at[slots, positions].set(outputs.tokens, mode="drop")
        return SequenceState(history, sequences.lengths.at[slots].set(positions + 1, mode="drop")), outputs

    def _score(self, outside: list[Parameter], hidden: jax.Array, wanted: jax.Array) -> TokenLogprobs[jax.Array]:
        wants_top, targets = wanted[0] > 0, wanted[1:]

        def score(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs[jax.Array]:
            return token_logprobs(self.num_logprobs, logits, tokens, wants_top)

        model, rows = self.forward.head(outside), jnp.arange(len(targets), dtype=jnp.int32)
        logits = model.logits(self.forward.normed(model, hidden), jnp.where(targets >= 0, rows, -1))
        return over_rows(score, self.mesh, logits, jnp.maximum(targets, 0))


def zeros(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """Made on the device: the host may not have as much memory."""
    return jnp.zeros(abstract.shape, abstract.dtype, device=abstract.sharding)


def _placed(array: np.ndarray, spec: jax.ShapeDtypeStruct) -> jax.Array:
    cast = array.astype(spec.dtype)
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: cast[index])


def _admit(sequences: SequenceState[jax.Array], new: jax.Array) -> SequenceState[jax.Array]:
    slot, length = new[0], new[1]
    history, lengths, num_drafts = sequences
    return SequenceState(
        history.at[slot].set(new[2:]),
        lengths.at[slot].set(length),
        None if num_drafts is None else num_drafts.at[slot].set(0),
    )
