"""A mixture of experts in place of the MLP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import ACTIVATIONS, matrix
from jaxserve.models.matrix import MatrixLayout
from jaxserve.models.weights import Part, Weight, whole


class MoE(nnx.Module):
    """Every row goes to its ``per_token`` likeliest experts (arXiv 2401.04088); none is dropped.

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
        self.gate_up = matrix(
            (2, count, hidden, inner), (None, "experts", "embed", "mlp"), dtype, rngs,
            MatrixLayout(gate=config.activation, is_grouped=True),
        )  # fmt: skip
        self.down = matrix(
            (count, inner, hidden), ("experts", "mlp", "embed"), dtype, rngs, MatrixLayout(is_grouped=True)
        )

    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        count, per_token = self.experts.count, self.experts.per_token
        shares = jax.nn.softmax(self.router.get_value().multiply(x, rows, jnp.dtype("float32")))
        weights, chosen = jax.lax.top_k(shares, per_token)
        if self.experts.normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)

        expert_of = chosen.reshape(-1)
        by_expert = jnp.argsort(expert_of)
        group_sizes = jnp.bincount(expert_of, length=count).astype(jnp.int32)
        of_x, of_inner = by_expert // per_token, None
        if rows is not None:
            of_x = rows[of_x]
            of_inner = jnp.where(of_x < 0, -1, jnp.arange(len(of_x), dtype=jnp.int32))
        inner = self.gate_up.get_value().gated(x, of_x, ACTIVATIONS[self.activation], None, group_sizes)
        y = self.down.get_value().multiply(inner, of_inner, groups=group_sizes)
        y = jnp.zeros_like(y).at[by_expert].set(y).reshape(len(x), per_token, -1)
        return jnp.einsum("rkh,rk->rh", y, weights.astype(y.dtype))


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
