"""What a layer asks of a matrix that it multiplies by, and what a model says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Gate = Callable[[jax.Array, jax.Array], jax.Array]
"""What a gated MLP makes of its two halves, ``[R, inner]`` each: ``act(gate) * up``, or another function of both."""


class MatrixLayout(NamedTuple):
    """What a model says of a matrix, besides shape and type."""

    num_outputs: int = 1
    """How many of its dimensions, the first ones, are outputs; the others are inputs."""
    gate: str | None = None
    """The activation between its two halves, where it is multiplied by ``gated`` alone and there are no biases."""
    is_divided: bool = False
    """Whether devices have a share of each of its two halves."""
    is_grouped: bool = False
    """Whether it is many matrices, one for each group of rows: experts'. They are ``[groups, in, out]``, and those of a
    gate ``[2, groups, in, out]``: inputs first, for XLA's grouped products would transpose them in every step."""


class Matrix(Protocol):
    """A pytree, whose leaves are the arrays that a program takes.

    rows: ``int32[R]``, of x those to multiply; for a negative number the result is anything. None: all, in order.
    groups: ``int32[G]``, of a grouped matrix how many of these rows, one after the other, belong to each group; for
    those behind, which belong to none, the result is anything.
    """

    skips_padding: ClassVar[bool]
    """Whether leaving rows out by a negative number saves work."""

    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        """``x[rows] @ matrix.T``: ``[T, in]`` -> ``[R, out]``, in the operands' type or ``out_dtype``."""
        ...

    def gated(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        activation: Gate,
        bias: jax.Array | None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        """``activation(x[rows] @ first.T, x[rows] @ second.T)`` of a matrix of two halves, ``[R, out / 2]``.

        bias: ``[2, out / 2]``, or one for each row, ``[R, 2, out / 2]``, added to the products.
        """
        ...

    def lookup(self, ids: jax.Array) -> jax.Array:
        """Rows ``ids`` ``int32[T]`` of the matrix, ``[T, in]``: of an embedding that is the output head too."""
        ...


class DenseKind(Protocol):
    """What makes matrices of dense parameters."""

    @property
    def skips_padding(self) -> bool:
        """As of all that it makes."""
        ...

    def of(self, weight: jax.Array, layout: MatrixLayout) -> Matrix:
        """From the dense parameter ``[out..., in...]``, which is deleted unless it is kept."""
        ...

    def abstract(self, weight: jax.ShapeDtypeStruct, layout: MatrixLayout) -> Matrix:
        """What ``of`` gives, without values."""
        ...


def gate(halves: jax.Array, activation: Gate, bias: jax.Array | None) -> jax.Array:
    """``[R, 2, inner]`` -> ``[R, inner]``."""
    halves = halves if bias is None else halves + bias
    return activation(halves[:, 0], halves[:, 1])
