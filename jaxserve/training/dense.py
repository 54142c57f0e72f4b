"""A model on one device as a function that has gradients, of rows of which each says what it sees.

Layers are the engine's. Their attention reads all keys that there are and masks; those of a paged cache's kernels have
no gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.errors import ModelError
from jaxserve.kernels.backend import CPU_TILING, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.plan import PlanLimits, new_plan
from jaxserve.kernels.reach import Reach
from jaxserve.kernels.xla import MASKED, Xla
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading.checkpoint import Checkpoint
from jaxserve.models.matrix import DenseMatrix, Parameter, layouts_of, taken
from jaxserve.models.registry import family_of
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_model, abstract_parameters


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DenseInputs(AttentionInputs):
    """Of a cache with one page a layer, of P places."""

    visible: jax.Array
    """``bool[T, P]``: which places each row sees, where its layer reaches so far."""
    positions: jax.Array
    """``int32[T]``, of the rows."""
    place_positions: jax.Array
    """``int32[P]``, of the keys."""


@dataclass(frozen=True)
class Dense(Xla):
    """Attention to one page, with a mask."""

    name = "dense"

    def attend(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        *,
        scale: float,
        reach: Reach,
        softcap: float | None,
    ) -> jax.Array:
        assert isinstance(inputs, DenseInputs)
        assert cache.v is not None
        (rows, heads, dim), kv_heads = q.shape, cache.k.shape[2]
        k, v = cache.k[layer], cache.v[layer]
        q = q.reshape(rows, kv_heads, heads // kv_heads, dim)
        scores = scale * jnp.einsum("tkgd,skd->kgts", q, k, preferred_element_type=jnp.float32)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        visible = inputs.visible
        if reach.is_bounded:
            visible &= inputs.place_positions >= reach.first_key(inputs.positions)[:, None]
        scores = jnp.where(visible, scores, MASKED)
        if sinks is not None:
            sink = jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
            scores = jnp.concatenate((scores, sink), axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., : len(k)].astype(v.dtype)
        return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(rows, heads, dim)


class DenseModel:
    """A checkpoint's model, loaded, with probes that are given anew in each call."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, *, max_len: int) -> None:
        """``config``: the checkpoint's, with probes; sequences are of ``max_len`` tokens at most. Raises ModelError."""
        if config.recurrent is not None or config.local_heads is not None or not config.has_values:
            raise ModelError("probes are for models whose layers keep keys and values, all of one shape")
        self.config, self._dtype = config, jnp.dtype("float32")
        family = family_of(config.architecture)
        self._graph, state = abstract_model(family.model, config, max_len=max_len, dtype=self._dtype)
        self._tree = jax.tree.structure(state)
        abstract, weights = abstract_parameters(state, make_mesh(1)), family.weights(config)
        self._names = list(abstract)
        abstract.pop("probes")
        checkpoint.check(abstract, weights)
        self.parameters = taken(checkpoint.load(abstract, weights), layouts_of(state), DenseMatrix)
        """By path, without the probes."""

    def bind(self, parameters: dict[str, Parameter], probes: jax.Array) -> Decoder:
        """The model. ``probes``: ``[num_probes, hidden]``"""
        every = parameters | {"probes": probes}
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, [every[name] for name in self._names]))

    def new_cache(self, num_places: int) -> KVCache[jax.Array]:
        """For ``num_places`` keys."""
        config = self.config
        pages = jnp.zeros((config.num_layers, num_places, config.num_held_kv_heads, config.head_dim), self._dtype)
        return KVCache(pages, pages, jnp.ones((config.num_layers, 2), jnp.float32))


def dense_inputs(
    places: jax.Array, visible: jax.Array, positions: jax.Array, place_positions: jax.Array
) -> DenseInputs:
    """``places``: ``int32[T]``, where keys and values of the rows go; the others as DenseInputs has them."""
    rows, num_places = visible.shape
    limits = PlanLimits(rows, 1, num_places, num_places, 1, CPU_TILING)
    return DenseInputs(
        slots=places, block_tables=jnp.zeros((1, 1), jnp.int32), plan=jax.tree.map(jnp.asarray, new_plan(limits)),
        limits=limits, backend=Dense(CPU_TILING, Target("cpu")), mesh=None,
        visible=visible, positions=positions, place_positions=place_positions,
    )  # fmt: skip
