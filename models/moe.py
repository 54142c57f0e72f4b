"""A mixture of experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.config import ModelConfig, SharedExpert
from jaxserve.models.layers import GatedMLP, gate_of, matrix, parameter
from jaxserve.models.matrix import MatrixLayout
from jaxserve.models.routing import ROUTE, Choice
from jaxserve.models.weights import Part, Weight, whole


class MoE(nnx.Module):
    """Every row goes to the ``per_token`` experts that its router chooses (models/routing.py); none is dropped.

    The rows are sorted by expert, so that each expert's are contiguous and grouped products serve all of them: shapes
    depend on the number of rows alone. ``gate_up`` is ``[2, experts, hidden, inner]``, ``down`` ``[experts, inner,
    hidden]``.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.experts is not None
        self.experts = config.experts
        self.activation = config.activation
        count, inner, hidden = self.experts.count, self.experts.intermediate_size, config.hidden_size
        self.router = matrix((count, hidden), (None, "embed"), dtype, rngs)
        self.choice_bias = (
            parameter((count,), (None,), jnp.dtype("float32"), rngs) if self.experts.choice_bias else None
        )
        plain = self.experts.gate is None and not self.experts.bias
        self.gate_up = matrix(
            (2, count, hidden, inner), (None, "experts", "embed", "mlp"), dtype, rngs,
            MatrixLayout(gate=config.activation if plain else None, is_grouped=True),
        )  # fmt: skip
        self.down = matrix(
            (count, inner, hidden), ("experts", "mlp", "embed"), dtype, rngs, MatrixLayout(is_grouped=True)
        )
        bias = self.experts.bias
        self.router_bias = parameter((count,), (None,), dtype, rngs) if bias else None
        self.gate_up_bias = parameter((2, count, inner), (None, "experts", "mlp"), dtype, rngs) if bias else None
        self.down_bias = parameter((count, hidden), ("experts", "embed"), dtype, rngs) if bias else None
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
        count, per_token = self.experts.count, self.experts.per_token
        weights, chosen = choice
        weights = weights.astype(x.dtype)

        expert_of = chosen.reshape(-1)
        by_expert = jnp.argsort(expert_of)
        group_sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)
        source = by_expert // per_token if rows is None else rows[by_expert // per_token]
        of_inner = None if rows is None else jnp.where(source < 0, -1, jnp.arange(len(source), dtype=jnp.int32))
        if self.experts.weighs_inputs:
            taken, of_taken = x[source] * weights.reshape(-1)[by_expert, None], of_inner
        else:
            taken, of_taken = x, source
        bias = None
        if self.gate_up_bias is not None:
            bias = self.gate_up_bias[...][:, expert_of[by_expert]].swapaxes(0, 1)
        inner = self.gate_up.get_value().gated(taken, of_taken, self._gate, bias, group_sizes)
        y = self.down.get_value().multiply(inner, of_inner, groups=group_sizes)
        y = jnp.zeros_like(y).at[by_expert].set(y).reshape(len(x), per_token, -1)
        y = y.sum(axis=1) if self.experts.weighs_inputs else jnp.einsum("rkh,rk->rh", y, weights)
        if self.down_bias is not None:
            y = y + jnp.einsum("rk,rkh->rh", weights, self.down_bias[...][chosen])
        return y if self.shared is None else y + self.shared(x, rows)

    def _gate(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        clamped = self.experts.gate
        if clamped is None:
            return gate_of(self.activation)(gate, up)
        gate, up = jnp.minimum(gate, clamped.limit), jnp.clip(up, -clamped.limit, clamped.limit)
        return (up + 1) * gate * jax.nn.sigmoid(clamped.alpha * gate)


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
