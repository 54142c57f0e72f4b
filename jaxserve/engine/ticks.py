"""The programs of a pipeline: a step is a tick, in which every stage computes a step of its own at the same bucket."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxserve.engine.batch import StepLayout
from jaxserve.engine.programs import STAGES, DeviceState, StepOutputs, StepPrograms, fed_back, sample_step
from jaxserve.engine.sampler import TokenLogprobs, token_logprobs
from jaxserve.kernels.cache import KVCache, cache_specs
from jaxserve.models.packing import Parameter
from jaxserve.models.weights import Weight
from jaxserve.sharding.pipeline import StagedModel
from jaxserve.sharding.rows import over_rows

EVERYWHERE = PartitionSpec()
SAMPLING_FIELDS = ("sample_rows", "sample_positions", "top_k", "seeds", "want_logprobs")


def programs_of(mesh: Mesh) -> type[StepPrograms]:
    """What runs on ``mesh``."""
    return StepPrograms if mesh.shape["pipe"] == 1 else TickPrograms


class TickPrograms(StepPrograms):
    """Stage s works on the step that entered s ticks ago, then hands its rows on; the last stage's step samples.

    Steps are equal in size under stall-free batching, so stages in lock-step wait for nothing. One that has fewer rows
    than the tick's bucket computes padding. Rows travel at the bucket's size; ``DeviceState.activations`` has room for
    the largest, and rows of no step are stale there, which is as good as any padding.
    """

    @property
    def num_cache_layers(self) -> int:
        return self.num_stages * self._staged.stages.num_slots

    def weights(self) -> Mapping[str, Weight]:
        return self._staged.stack(super().weights())

    def _take_apart(self, graph: nnx.GraphDef, state: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
        self._staged = StagedModel(graph, state, self.mesh)
        return self._staged.abstract_parameters

    def _abstract_activations(self) -> jax.ShapeDtypeStruct:
        return self._abstract_hidden(self.buckets[-1])

    def _abstract_hidden(self, rows: int) -> jax.ShapeDtypeStruct:
        shape = (self.num_stages, rows, self.model_config.hidden_size)
        return jax.ShapeDtypeStruct(shape, self._dtype, sharding=self.staged)

    def _step(
        self,
        layout: StepLayout,
        parameters: list[Parameter],
        state: DeviceState[jax.Array],
        ints: jax.Array,
        floats: jax.Array,
    ) -> tuple[DeviceState[jax.Array], StepOutputs]:
        outside, slots = self._staged.split(parameters)
        # The partitioner divides a stage over the axis ``tensor``, as it divides a model without stages.
        manual = frozenset(axis for axis, size in self.mesh.shape.items() if axis == "pipe" or size == 1)
        tick = jax.shard_map(
            partial(self._tick, layout),
            mesh=self.mesh,
            in_specs=(EVERYWHERE, STAGES, DeviceState(cache_specs(pipe="pipe"), EVERYWHERE, STAGES), STAGES),
            out_specs=(STAGES, STAGES, STAGES, EVERYWHERE),
            axis_names=manual,
            check_vma=False,
        )
        cache, activations, made, (hidden, sampling) = tick(outside, slots, state, ints)
        model = self._staged.outside(outside)
        num_seqs = self.config.max_num_seqs
        fields = dict(zip(SAMPLING_FIELDS, jnp.split(sampling, [num_seqs * i for i in range(1, 5)]), strict=True))
        logits = model.logits(model.norm(hidden))
        tokens, logprobs, last_tokens = sample_step(logits, fields, floats, state.last_tokens, self.mesh)
        return DeviceState(cache, last_tokens, activations), StepOutputs(tokens, logprobs, made)

    def _tick(
        self,
        layout: StepLayout,
        outside: list[jax.Array],
        slots: list[jax.Array],
        state: DeviceState[jax.Array],
        ints: jax.Array,
    ) -> tuple[KVCache[jax.Array], jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """One stage's part: its cache, what it has got from the stage before and made of it (``[1, T, hidden]``), and
        of the last stage the sampling rows ``[S, hidden]`` and sampling fields.
        """
        assert state.activations is not None
        num_rows, last = layout.limits.num_rows, self.num_stages - 1
        stage = jax.lax.axis_index("pipe")
        model, fields = self._staged.outside(outside), layout.split(ints[0])
        entering = model.embed(fed_back(fields, state.last_tokens), fields["positions"])
        x = jnp.where(stage == 0, entering, state.activations[0, :num_rows])
        # Attention is manual over ``tensor`` as well, within what is manual over ``pipe`` already: so is its mesh.
        inputs = self._attention_inputs(layout, fields, jax.sharding.get_abstract_mesh())
        x, cache = self._staged.run_stage(model, slots, x, fields["positions"], state.cache, inputs)
        sampling = jnp.concatenate([fields[name] for name in SAMPLING_FIELDS])
        leaving = jax.tree.map(
            lambda mine: jax.lax.psum(jnp.where(stage == last, mine, jnp.zeros_like(mine)), "pipe"),
            (x[fields["sample_rows"]], sampling),
        )
        received = jax.lax.ppermute(x, "pipe", [(i, i + 1) for i in range(last)])
        return cache, state.activations.at[0, :num_rows].set(received), x[None], leaving

    def _score(self, parameters: list[Parameter], hidden: jax.Array, targets: jax.Array) -> TokenLogprobs[jax.Array]:
        model = self._staged.outside(self._staged.split(parameters)[0])
        return over_rows(token_logprobs, self.mesh, model.logits(model.norm(hidden[-1])), targets)
