"""Pipeline parallelism in SPMD's terms: every device runs the same program, on the layers of its own stage.

The layers that the stages have in one place, a slot, are one set of parameters, stacked along a leading axis that the
mesh axis ``pipe`` divides, so a device holds and loads the layers of its stage only (GSPMD, arXiv 2105.04663, has
stages as a sharded dimension too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError, ModelError
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.models.decoder import Decoder, run_layer
from jaxserve.models.layers import Positions
from jaxserve.models.matrix import Parameter
from jaxserve.models.weights import Part, Weight
from jaxserve.sharding.rules import abstract_parameters


@dataclass(frozen=True)
class Stages:
    """Consecutive layers on every stage; the first stages have one more where they do not divide evenly."""

    num_layers: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.num_stages > self.num_layers:
            raise ConfigError(
                f"pipeline_parallel must not exceed the model's {self.num_layers} layers, got {self.num_stages}"
            )

    @property
    def num_slots(self) -> int:
        return -(-self.num_layers // self.num_stages)

    def num_used(self, slot: int) -> int:
        """How many stages, the first ones, have a layer in the slot."""
        each, more = divmod(self.num_layers, self.num_stages)
        return self.num_stages if slot < each else more

    def layer(self, stage: int, slot: int) -> int:
        """What the stage has in the slot. An unused one holds a copy of the first stage's: its results are dropped."""
        if stage >= self.num_used(slot):
            return slot
        each, more = divmod(self.num_layers, self.num_stages)
        return stage * each + min(stage, more) + slot

    def layers(self, slot: int) -> list[int]:
        return [self.layer(stage, slot) for stage in range(self.num_stages)]

    def all_layers(self) -> list[int]:
        """What the first stage has in its slots, then the second, and so on."""
        return [self.layer(stage, slot) for stage in range(self.num_stages) for slot in range(self.num_slots)]


@dataclass(frozen=True)
class _Kind:
    """A structure of layer: what is not in the parameters, such as the attention window."""

    graph: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef


@dataclass(frozen=True)
class _Slot:
    kinds: tuple[_Kind, ...]
    """The different ones of its layers."""
    kind_of_stage: tuple[int, ...]


class StagedModel:
    """A model taken apart for the stages of ``mesh``: what is outside its layers, and the slots.

    Embedding, final norm and output head are on every stage. ``graph``, ``state``: of the whole model, as
    abstract_model gives them. Raises ConfigError for more stages than layers, and ModelError where layers that fall
    into one slot have different parameters.
    """

    def __init__(self, graph: nnx.GraphDef, state: nnx.State, mesh: Mesh) -> None:
        model = nnx.merge(graph, state)
        layers = list(model.layers)
        model.layers = nnx.List([])
        self.stages = Stages(len(layers), mesh.shape["pipe"])
        self._graph, outside = nnx.split(model)
        self._tree = jax.tree.structure(outside)
        self.abstract_parameters = abstract_parameters(outside, mesh)
        """By path, layers.N for slot N; in the order in which ``split`` expects them."""
        self.num_outside = len(self.abstract_parameters)
        """How many of them, the first ones, are outside the layers."""
        self._slots = [self._stack(slot, layers, mesh) for slot in range(self.stages.num_slots)]

    def stack(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """How the parameters are assembled, from how the whole model's are."""
        stacked = {name: weight for name, weight in weights.items() if not name.startswith("layers.")}
        for name in list(self.abstract_parameters)[self.num_outside :]:
            _, slot, rest = name.split(".", 2)
            layers = enumerate(self.stages.layers(int(slot)))
            stacked[name] = tuple(
                Part(part.name, partial(_lead, part), (stage, *part.start))
                for stage, layer in layers
                for part in weights[f"layers.{layer}.{rest}"]
            )
        return stacked

    def split(self, parameters: list[Parameter]) -> tuple[list[Parameter], list[Parameter]]:
        """Those outside the layers, and the slots'."""
        return parameters[: self.num_outside], parameters[self.num_outside :]

    def outside(self, parameters: Sequence[Parameter]) -> Decoder:
        """The model without its layers."""
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, parameters))

    def run_stage(
        self,
        model: Decoder,
        parameters: list[Parameter],
        x: jax.Array,
        token_ids: jax.Array,
        positions: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """The layers of this device's stage: rows ``[T, hidden]`` of these tokens -> the same, and the new cache.

        Runs under shard_map over ``pipe``. ``model`` is what is outside the layers, ``parameters`` are this device's
        shares of the slots', ``[1, ...]`` each; the cache has the slots as its layers.
        """
        stage, num_stages = jax.lax.axis_index("pipe"), self.stages.num_stages
        taken = model.beside(token_ids, positions)
        leaves = iter(parameters)
        for number, slot in enumerate(self._slots):
            places = [next(leaves) for _ in range(slot.kinds[0].tree.num_leaves)]
            mine = jax.tree.map(lambda array: array[0], places)
            num_used = self.stages.num_used(number)
            used = stage < num_used
            # What an unused slot computes goes to the dummy page, and its rows pass it by.
            slots = inputs.slots if num_used == num_stages else jnp.where(used, inputs.slots, 0)
            run = partial(_run_kind, mine, taken, jnp.int32(model.config.cache_layer(number)))
            branches = [partial(run, kind) for kind in slot.kinds]
            operands = x, cache, replace(inputs, slots=slots)
            if len(branches) == 1:
                y, cache = branches[0](*operands)
            else:
                y, cache = jax.lax.switch(jnp.array(slot.kind_of_stage)[stage], branches, *operands)
            x = y if num_used == num_stages else jnp.where(used, y, x)
        return x, cache

    def _stack(self, slot: int, layers: Sequence[nnx.Module], mesh: Mesh) -> _Slot:
        """Add the slot's parameters to ``abstract_parameters``."""
        kinds: list[_Kind] = []
        kind_of_stage = []
        first, *_ = numbers = self.stages.layers(slot)
        stacked: dict[str, jax.ShapeDtypeStruct] = {}
        for number in numbers:
            graph, state = nnx.split(layers[number])
            parameters = abstract_parameters(state, mesh)
            stacked = stacked or parameters
            differing = [name for name in stacked | parameters if stacked.get(name) != parameters.get(name)]
            if differing:
                raise ModelError(
                    f"pipeline_parallel {self.stages.num_stages} puts layers {first} and {number} into the same place "
                    f"of two stages, but they differ in {', '.join(differing)}"
                )
            kind = next((i for i, kind in enumerate(kinds) if kind.graph == graph), len(kinds))
            if kind == len(kinds):
                kinds.append(_Kind(graph, jax.tree.structure(state)))
            kind_of_stage.append(kind)
        for name, spec in stacked.items():
            sharding = NamedSharding(mesh, PartitionSpec("pipe", *spec.sharding.spec))
            shape = (self.stages.num_stages, *spec.shape)
            self.abstract_parameters[f"layers.{slot}.{name}"] = jax.ShapeDtypeStruct(
                shape, spec.dtype, sharding=sharding
            )
        return _Slot(tuple(kinds), tuple(kind_of_stage))


def _run_kind(
    parameters: list[Parameter],
    positions: Positions,
    index: jax.Array,
    kind: _Kind,
    x: jax.Array,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
) -> tuple[jax.Array, KVCache[jax.Array]]:
    layer = nnx.merge(kind.graph, jax.tree.unflatten(kind.tree, parameters))
    return run_layer(layer, x, None, positions, cache, inputs, index)


def _lead(part: Part, tensor: np.ndarray) -> np.ndarray:
    return part.view(tensor)[None]
