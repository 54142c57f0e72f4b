"""The forward pass of a step: the rows of its batch go in, the rows that draws follow come out.

A model lies whole on the devices, each with a share of every layer, or in stages, each with layers of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.speculation import SequenceState, moved
from jaxserve.engine.step import StepLayout, plan_of
from jaxserve.kernels.backend import Backend
from jaxserve.kernels.cache import KVCache, cache_specs, recurrent_specs
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.recurrent import Segments, segments_of
from jaxserve.models.config import Memory, ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.matrix import Parameter
from jaxserve.models.weights import Weight
from jaxserve.sharding.pipeline import StagedModel
from jaxserve.sharding.rules import abstract_parameters

EVERYWHERE, STAGES = PartitionSpec(), PartitionSpec("pipe")
"""How arrays lie on a mesh: the same on each device, or divided along their first axis among a pipeline's stages."""


class ModelState[Array](NamedTuple):
    """What one forward pass leaves to the next."""

    cache: KVCache[Array]
    activations: Array | None
    """``[stages, T of the largest bucket, hidden]``: what each stage of a pipeline has got from the one before."""


class Drawn(NamedTuple):
    """What a forward pass leaves to sampling, and to scores."""

    rows: jax.Array
    """``[R, hidden]``: the normed hidden states that draws follow."""
    draws: jax.Array
    """``int32[layout.num_draw_ints]``: the fields of the draws."""
    hidden: jax.Array
    """Hidden states of the batch's rows, normed ones ``[T, hidden]``; of a pipeline what every stage has made,
    ``[stages, T, hidden]``, not normed."""


class Rows(NamedTuple):
    """A flat batch as models take it, ``int32[T]`` each. Padding is token 0 at position 0, in the dummy page."""

    token_ids: jax.Array
    positions: jax.Array
    kv_slots: jax.Array
    """Where the row's key and value go: page * page size + offset."""
    is_token: jax.Array
    """``bool[T]``: not of padding, nor where a sequence has no such draft."""


def rows_of(fields: Mapping[str, jax.Array], sequences: SequenceState[jax.Array], page_size: int) -> Rows:
    """A step's rows. The device alone knows what it has just sampled, so their tokens are from its history."""
    seqs, positions = fields["row_seqs"], fields["row_positions"]
    is_token = seqs >= 0
    if sequences.num_drafts is None:
        positions = jnp.where(positions < 0, sequences.lengths[seqs] + positions, positions)
    else:
        offsets, num_drafts = -1 - positions, sequences.num_drafts[seqs]
        is_token &= offsets <= num_drafts
        last = sequences.lengths[seqs] - 1
        positions = jnp.where(positions < 0, last + jnp.minimum(offsets, num_drafts), positions)
    page = fields["block_tables"][seqs, positions // page_size]
    return Rows(
        token_ids=jnp.where(is_token, sequences.history[seqs, positions], 0),
        positions=positions,
        kv_slots=jnp.where(is_token, page * page_size + positions % page_size, 0),
        is_token=is_token,
    )


class Forward(Protocol):
    """A model on a mesh, as the programs run it."""

    abstract_parameters: dict[str, jax.ShapeDtypeStruct]
    """By path, as they are loaded, in the order in which the programs take them."""
    kept: Mapping[Memory, Sequence[int]]
    """Of which layers a cache is, in its order; a pipeline's unused places have a copy of a layer."""

    def assembled(self, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
        """How the parameters are assembled, from how the whole model's are."""
        ...

    def outside[P](self, parameters: list[P]) -> list[P]:
        """Those that are in no layer: of the embedding, the final norm, the output head."""
        ...

    def head(self, outside: Sequence[Parameter]) -> Decoder:
        """The model without its layers."""
        ...

    def abstract_hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        """Of ``Drawn.hidden``."""
        ...

    def abstract_activations(self, rows: int) -> jax.ShapeDtypeStruct | None:
        """Of ``ModelState.activations``."""
        ...

    def normed(self, model: Decoder, hidden: jax.Array) -> jax.Array:
        """What the output head takes, ``[T, hidden]``, of ``Drawn.hidden``."""
        ...

    def __call__(
        self,
        layout: StepLayout,
        parameters: list[Parameter],
        state: ModelState[jax.Array],
        sequences: SequenceState[jax.Array],
        ints: jax.Array,
    ) -> tuple[ModelState[jax.Array], Drawn]:
        """ints: ``int32[stages, layout.num_ints]``, of each stage the step that is in it."""
        ...


class WholeForward:
    """Every device has a share of every layer, and all work on one step.

    ``skips_padding``: attention and products leave out the rows that they are told to.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        state: nnx.State,
        mesh: Mesh,
        config: ModelConfig,
        backend: Backend,
        skips_padding: bool,
    ) -> None:
        self._mesh, self._config, self._backend = mesh, config, backend
        self._skips_padding = skips_padding
        self._graph, self._tree = graph, jax.tree.structure(state)
        self.abstract_parameters = abstract_parameters(state, mesh)
        self.kept = config.by_memory(range(config.num_layers))
        model = nnx.merge(graph, state)
        model.layers = nnx.List([])
        self._head_graph, head_state = nnx.split(model)
        self._head_tree = jax.tree.structure(head_state)

    def assembled(self, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
        return weights

    def outside[P](self, parameters: list[P]) -> list[P]:
        named = zip(self.abstract_parameters, parameters, strict=True)
        return [parameter for name, parameter in named if not name.startswith("layers.")]

    def head(self, outside: Sequence[Parameter]) -> Decoder:
        return nnx.merge(self._head_graph, jax.tree.unflatten(self._head_tree, outside))

    def abstract_hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        dtype = self.abstract_parameters["embedding"].dtype
        sharding = NamedSharding(self._mesh, EVERYWHERE)
        return jax.ShapeDtypeStruct((rows, self._config.hidden_size), dtype, sharding=sharding)

    def abstract_activations(self, rows: int) -> None:
        return None

    def normed(self, model: Decoder, hidden: jax.Array) -> jax.Array:
        return hidden

    def __call__(
        self,
        layout: StepLayout,
        parameters: list[Parameter],
        state: ModelState[jax.Array],
        sequences: SequenceState[jax.Array],
        ints: jax.Array,
    ) -> tuple[ModelState[jax.Array], Drawn]:
        fields = layout.split(ints[0])
        rows = rows_of(fields, sequences, layout.limits.page_size)
        model = nnx.merge(self._graph, jax.tree.unflatten(self._tree, parameters))
        inputs = _attention_inputs(layout, fields, rows, self._backend, self._config, self._mesh)
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            hidden, cache = model(rows.token_ids, rows.positions, self._counted(rows.is_token), state.cache, inputs)
        return ModelState(cache, None), Drawn(hidden[fields["draw_rows"]], layout.draws_of(ints[0]), hidden)

    def _counted(self, is_token: jax.Array) -> jax.Array | None:
        """The rows of tokens, where all work on padding can be left out: nothing that counts reads those rows.

        So shapes are a bucket's, but on CPUs its padding costs nothing, and they need no finer buckets than GPUs.
        """
        if not self._skips_padding:
            return None
        return jnp.where(is_token, jnp.arange(len(is_token), dtype=jnp.int32), -1)


class StagedForward:
    """Stage s works on the step that entered s launches ago, then hands its rows on; the last stage's step is drawn.

    Steps are equal in size under stall-free batching, so stages in lock-step wait for nothing. One that has fewer rows
    than the bucket computes padding. Rows travel at the bucket's size; ``ModelState.activations`` has room for the
    largest, and rows of no step are stale there, which is as good as any padding.
    """

    def __init__(
        self, graph: nnx.GraphDef, state: nnx.State, mesh: Mesh, config: ModelConfig, backend: Backend
    ) -> None:
        self._mesh, self._config, self._backend = mesh, config, backend
        self._model = StagedModel(graph, state, mesh)
        self._num_stages = mesh.shape["pipe"]
        self.abstract_parameters = self._model.abstract_parameters
        self.kept = config.by_memory(self._model.stages.all_layers())

    def assembled(self, weights: Mapping[str, Weight]) -> Mapping[str, Weight]:
        return self._model.stack(weights)

    def outside[P](self, parameters: list[P]) -> list[P]:
        return parameters[: self._model.num_outside]

    def head(self, outside: Sequence[Parameter]) -> Decoder:
        return self._model.outside(outside)

    def abstract_hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        shape, dtype = (self._num_stages, rows, self._config.hidden_size), self.abstract_parameters["embedding"].dtype
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, STAGES))

    def abstract_activations(self, rows: int) -> jax.ShapeDtypeStruct:
        return self.abstract_hidden(rows)

    def normed(self, model: Decoder, hidden: jax.Array) -> jax.Array:
        return model.norm(hidden[-1])

    def __call__(
        self,
        layout: StepLayout,
        parameters: list[Parameter],
        state: ModelState[jax.Array],
        sequences: SequenceState[jax.Array],
        ints: jax.Array,
    ) -> tuple[ModelState[jax.Array], Drawn]:
        outside, places = self._model.split(parameters)
        # The partitioner divides a stage over the axis ``tensor``, as it divides a model without stages.
        manual = frozenset(axis for axis, size in self._mesh.shape.items() if axis == "pipe" or size == 1)
        divided = cache_specs(pipe="pipe")
        if self.kept[Memory.STATE]:
            divided = divided._replace(recurrent=recurrent_specs(pipe="pipe"))
        if self.kept[Memory.LOCAL_PAGES]:
            divided = divided._replace(local=cache_specs(pipe="pipe"))
        run = jax.shard_map(
            partial(self._run_stage, layout),
            mesh=self._mesh,
            in_specs=(EVERYWHERE, STAGES, ModelState(divided, STAGES), EVERYWHERE, STAGES),
            out_specs=(STAGES, STAGES, EVERYWHERE),
            axis_names=manual,
            check_vma=False,
        )
        state, hidden, (rows, draws) = run(outside, places, state, sequences, ints)
        return state, Drawn(self.head(outside).norm(rows), draws, hidden)

    def _run_stage(
        self,
        layout: StepLayout,
        outside: list[Parameter],
        places: list[Parameter],
        state: ModelState[jax.Array],
        sequences: SequenceState[jax.Array],
        ints: jax.Array,
    ) -> tuple[ModelState[jax.Array], jax.Array, tuple[jax.Array, jax.Array]]:
        """One stage's part: its state, what it has made, ``[1, T, hidden]``, and of the last stage the rows that draws
        follow, ``[R, hidden]``, and the draws.
        """
        assert state.activations is not None
        last, stage = self._num_stages - 1, jax.lax.axis_index("pipe")
        model, fields = self.head(outside), layout.split(ints[0])
        rows = rows_of(fields, sequences, layout.limits.page_size)
        entering = model.embed(rows.token_ids, rows.positions)
        x = jnp.where(stage == 0, entering, state.activations[0, : layout.num_rows])
        # Attention is manual over ``tensor`` as well, within what is manual over ``pipe`` already: so is its mesh.
        mesh = jax.sharding.get_abstract_mesh()
        inputs = _attention_inputs(layout, fields, rows, self._backend, self._config, mesh)
        x, cache = self._model.run_stage(model, places, x, rows.token_ids, rows.positions, state.cache, inputs)
        leaving = jax.tree.map(
            lambda mine: jax.lax.psum(jnp.where(stage == last, mine, jnp.zeros_like(mine)), "pipe"),
            (x[fields["draw_rows"]], layout.draws_of(ints[0])),
        )
        received = jax.lax.ppermute(x, "pipe", [(i, i + 1) for i in range(last)])
        activations = state.activations.at[0, : layout.num_rows].set(received)
        return ModelState(cache, activations), x[None], leaving


def _attention_inputs(
    layout: StepLayout,
    fields: dict[str, jax.Array],
    rows: Rows,
    backend: Backend,
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
) -> AttentionInputs:
    plan, limits = plan_of(fields), layout.limits
    if limits.max_drafts:
        # Where no draft is nothing need be seen; something must be, so in a plan of windows what the last one sees.
        seen = rows.positions + 1 if limits.window is not None else jnp.where(rows.is_token, rows.positions + 1, 1)
        plan = moved(plan, seen)
    segments = segments_for(config, layout, fields["row_seqs"], rows)
    return AttentionInputs(rows.kv_slots, fields["block_tables"], plan, limits, backend, mesh, segments)


def segments_for(config: ModelConfig, layout: StepLayout, row_seqs: jax.Array, rows: Rows) -> Segments | None:
    """The rows as chunks, for the layers that take them so, if the model has any."""
    if config.recurrent is None:
        return None
    num_slots, reach = layout.limits.max_num_seqs, config.recurrent.conv_width - 1
    return segments_of(row_seqs, rows.positions, rows.is_token, num_slots=num_slots, reach=reach)
