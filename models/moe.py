"""A mixture of experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.kernels.shards import own_share, summed_over_shards
from jaxserve.models.config import ModelConfig, SharedExpert
from jaxserve.models.layers import GatedMLP, gate_of, matrix, parameter
from jaxserve.models.matrix import Matrix, MatrixLayout
from jaxserve.models.routing import ROUTE, Choice
from jaxserve.models.weights import Part, Weight, whole


class MoE(nnx.Module):
    """Every row goes to the ``per_token`` experts that its router chooses (models/routing.py); none is dropped.

    The rows are sorted by expert, so that each expert's are contiguous and grouped products serve all of them: shapes
    depend on the number of rows alone. ``gate_up`` is ``[2, experts, hidden, inner]``, ``down`` ``[experts, inner,
    hidden]``. Devices have a share of every expert's inner width, or experts of their own; either way each computes a
    part of every row's sum.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.experts is not None
        self.experts = config.experts
        self.activation = config.activation
        self.expert_parallel = config.expert_parallel
        own, width = ("experts", None) if config.expert_parallel else (None, "mlp")
        count, inner, hidden = self.experts.count, self.experts.intermediate_size, config.hidden_size
        self.router = matrix((count, hidden), (None, "embed"), dtype, rngs)
        self.choice_bias = (
            parameter((count,), (None,), jnp.dtype("float32"), rngs) if self.experts.choice_bias else None
        )
        plain = self.experts.gate is None and not self.experts.bias
        self.gate_up = matrix(
            (2, count, hidden, inner), (None, own, "embed", width), dtype, rngs,
            MatrixLayout(gate=config.activation if plain else None, is_grouped=True),
        )  # fmt: skip
        self.down = matrix((count, inner, hidden), (own, width, "embed"), dtype, rngs, MatrixLayout(is_grouped=True))
        bias = self.experts.bias
        self.router_bias = parameter((count,), (None,), dtype, rngs) if bias else None
        self.gate_up_bias = parameter((2, count, inner), (None, own, width), dtype, rngs) if bias else None
        self.down_bias = parameter((count, hidden), (None, "embed"), dtype, rngs) if bias else None
        shared = self.experts.shared
        self.shared = None if shared is None else SharedMLP(config, shared, dtype, rngs)

    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """As GatedMLP's."""
        return self.mixed(x, rows, self.choose(x, rows))

    def choose(self, x: jax.Array, rows: jax.Array | None) -> Choice:
        """Of each row the experts, and their weights."""
        logits = self.router.get_value().multiply(x, rows, jnp.dtype("float32"))
        if self.router_bias is not None:
            logits = logits + self.router_bias[...]
        choice_bias = None if self.choice_bias is None else self.choice_bias[...]
        return ROUTE[self.experts.router](self.experts, logits, choice_bias)

    def mixed(self, x: jax.Array, rows: jax.Array | None, choice: Choice) -> jax.Array:
        """What the experts that are chosen make of the rows."""
        weights, chosen = choice
        weights = weights.astype(x.dtype)
        if rows is not None:
            chosen = jnp.where(rows[:, None] < 0, self.experts.count, chosen)
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        own, width = ("tensor", None) if self.expert_parallel else (None, "tensor")
        everywhere, halves = PartitionSpec(), PartitionSpec(None, own, None, width)
        specs = everywhere, everywhere, everywhere, halves, PartitionSpec(own, width), PartitionSpec(None, own, width)
        mix = summed_over_shards(self._mixed, specs)
        y = mix(x, weights, chosen, self.gate_up.get_value(), self.down.get_value(), bias)
        if self.down_bias is not None:
            y = y + jnp.einsum("rk,rkh->rh", weights, self.down_bias[...][chosen])
        return y if self.shared is None else y + self.shared(x, rows)

    def _mixed(
        self,
        x: jax.Array,
        weights: jax.Array,
        chosen: jax.Array,
        gate_up: Matrix,
        down: Matrix,
        bias: jax.Array | None,
    ) -> jax.Array:
        """A device's part of what the chosen experts make of rows, ``[T, hidden]``, by its part of the matrices.

        chosen: ``int32[T, per_token]``; an expert that there is not, such as of padding, makes nothing.
        """
        count, per_token = self.experts.count, self.experts.per_token
        if self.expert_parallel:
            count, first = own_share(count)
            chosen = jnp.where((first <= chosen) & (chosen < first + count), chosen - first, count)
        expert_of = chosen.reshape(-1)
        by_expert = jnp.argsort(expert_of)
        group_sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)
        source = by_expert // per_token
        if self.experts.weighs_inputs:
            x, source = x[source] * weights.reshape(-1)[by_expert, None], jnp.arange(len(source))
        if bias is not None:
            bias = bias[:, expert_of[by_expert]].swapaxes(0, 1)
        inner = gate_up.gated(x, source, self._gate, bias, group_sizes)
        y = down.multiply(inner, groups=group_sizes)
        places = jnp.zeros_like(by_expert).at[by_expert].set(jnp.arange(len(by_expert)), unique_indices=True)
        factors = jnp.ones_like(weights) if self.experts.weighs_inputs else weights
        return _summed(y, places.reshape(chosen.shape), factors, chosen < count)

    def _gate(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        clamped = self.experts.gate
        if clamped is None:
            return gate_of(self.activation)(gate, up)
        gate, up = jnp.minimum(gate, clamped.limit), jnp.clip(up, -clamped.limit, clamped.limit)
        return (up + 1) * gate * jax.nn.sigmoid(clamped.alpha * gate)


def _summed(y: jax.Array, places: jax.Array, factors: jax.Array, held: jax.Array) -> jax.Array:
    """``[T, hidden]``: of each row the sum of ``factors * y[places]`` where ``held``, ``[T, per_token]`` each.

    In float32 and in the order of the row's own choice, so that it does not depend on its batch-mates. Written out, as
    XLA on CPUs then takes whole rows: ten times as fast as summing up a gather of three dimensions.
    """
    total = jnp.zeros((len(places), y.shape[1]), jnp.float32)
    for place, factor, is_held in zip(places.T, factors.T, held.T, strict=True):
        part = y[place].astype(jnp.float32) * factor[:, None].astype(jnp.float32)
        total = total + jnp.where(is_held[:, None], part, 0)
    return total.astype(y.dtype)


class SharedMLP(nnx.Module):
    """The expert of all rows: ``sigmoid(gate(x)) * mlp(x)``, or without a gate."""

    def __init__(self, config: ModelConfig, shared: SharedExpert, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.mlp = GatedMLP(config, shared.intermediate_size, dtype, rngs)
        self.gate = parameter((config.hidden_size,), ("embed",), dtype, rngs) if shared.gated else None

    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """As GatedMLP's."""
        y = self.mlp(x, rows)
        return y if self.gate is None else jax.nn.sigmoid(x @ self.gate[...])[:, None] * y


def moe_weights(ours: str, router: str, expert: str, gate: str, up: str, down: str, count: int) -> dict[str, Weight]:
    """MoE at ``ours``; ``expert`` is the tensors' prefix with ``{}`` for the expert's number."""

    def inputs_first(tensor: np.ndarray) -> np.ndarray:
        return tensor.T[None]

    def inputs_first_half(tensor: np.ndarray) -> np.ndarray:
        return tensor.T[None, None]

    return {
        f"{ours}.router": whole(router),
        f"{ours}.gate_up": tuple(
            Part(f"{expert.format(i)}.{name}.weight", inputs_first_half, (half, i))
            for i in range(count)
            for half, name in enumerate((gate, up))
        ),
        f"{ours}.down": tuple(Part(f"{expert.format(i)}.{down}.weight", inputs_first, (i,)) for i in range(count)),
    }


def separate_experts(name: str, tensor: np.ndarray) -> Mapping[str, np.ndarray]:
    """Each expert's matrices, where ``tensor`` is those of all, ``gate_up_proj`` ``[experts, 2 * inner, hidden]`` or
    ``down_proj`` ``[experts, hidden, inner]``, as views under the names that files have which keep them apart."""
    prefix, _, last = name.rpartition(".experts.")
    kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
    if not kinds or tensor.ndim != 3 or tensor.shape[1] % len(kinds):
        return {name: tensor}
    apart = tensor.reshape(len(tensor), len(kinds), -1, tensor.shape[2])
    return {
        f"{prefix}.experts.{i}.{kind}.weight": apart[i, place]
        for i in range(len(apart))
        for place, kind in enumerate(kinds)
    }
