"""Matrices as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxserve.models.matrix.layout import Gate, MatrixLayout, gate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseMatrix:
    """As Hugging Face stores it, outputs first: nothing is transposed at load, XLA's CPU products of few rows are up to
    1.4 times faster than with ``[in, out]``, and GPU libraries take either."""

    weight: jax.Array
    layout: MatrixLayout = field(metadata={"static": True})

    skips_padding: ClassVar[bool] = False

    @classmethod
    def of(cls, weight: jax.Array, layout: MatrixLayout) -> Self:
        return cls(weight, layout)

    @classmethod
    def abstract(cls, weight: jax.ShapeDtypeStruct, layout: MatrixLayout) -> Self:
        return cls(weight, layout)  # type: ignore[arg-type]

    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        x = x if rows is None else x[rows]
        if groups is not None:
            return jax.lax.ragged_dot(x, self.weight, groups, preferred_element_type=out_dtype)
        weight = self.weight.reshape(math.prod(self.weight.shape[: self.layout.num_outputs]), -1)
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)

    def gated(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        activation: Gate,
        bias: jax.Array | None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        x = x if rows is None else x[rows]
        if groups is not None:
            halves = jnp.stack([jax.lax.ragged_dot(x, half, groups) for half in self.weight], axis=1)
        elif self.layout.is_divided:
            # Not as one matrix: each device holds a share of both halves.
            halves = jnp.einsum("th,gih->tgi", x, self.weight)
        else:
            # As one matrix: of three dimensions, XLA on CPUs transposes the weights in every step.
            halves = self.multiply(x).reshape(len(x), 2, -1)
        return gate(halves, activation, bias)

    def lookup(self, ids: jax.Array) -> jax.Array:
        return self.weight[ids]
