"""The matrices that layers multiply by: what a layer asks of one, whatever its weights look like in memory.

A model declares its matrices as dense parameters (layers.matrix), and so they are loaded and stored. How they lie in
memory is a kind, chosen for the device: programs take ``kind.of`` of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels import cpu_gemm

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
    groups: ``int32[G]``, of a grouped matrix how many of these rows, one after the other, belong to each group.
    """

    skips_padding: ClassVar[bool]
    """Whether leaving rows out by a negative number saves work."""

    @classmethod
    def of(cls, weight: jax.Array, layout: MatrixLayout) -> Self:
        """From the dense parameter ``[out..., in...]``, which is deleted unless it is kept."""
        ...

    @classmethod
    def abstract(cls, weight: jax.ShapeDtypeStruct, layout: MatrixLayout) -> Self:
        """What ``of`` gives, without values."""
        ...

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


Parameter = jax.Array | Matrix
"""What programs take: a matrix of some kind, or the array of anything else."""


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PanelMatrix:
    """In the panels of kernels/cpu_gemm.py, whose native products are faster than XLA's on CPUs.

    float32 or bfloat16, on one device: a division of the matrix would have to follow its panels.
    """

    panels: jax.Array
    """See cpu_gemm.pack."""
    num_outputs: int = field(metadata={"static": True})
    num_inputs: int = field(metadata={"static": True})
    gate: str | None = field(metadata={"static": True})
    """One of cpu_gemm.GATES: two matrices lie in pairs, and the product is ``gate(x @ first.T) * (x @ second.T)``."""

    skips_padding: ClassVar[bool] = True

    @classmethod
    def of(cls, weight: jax.Array, layout: MatrixLayout) -> Self:
        matrix: Self = jax.block_until_ready(_packed(cls, weight, layout))
        weight.delete()
        return matrix

    @classmethod
    def abstract(cls, weight: jax.ShapeDtypeStruct, layout: MatrixLayout) -> Self:
        return jax.eval_shape(partial(_packed, cls, layout=layout), weight)

    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        """Sums are float32, and a row's do not depend on the other rows."""
        rows = jnp.arange(len(x), dtype=jnp.int32) if rows is None else rows
        groups = jnp.array([len(rows)], jnp.int32) if groups is None else groups
        return cpu_gemm.multiply(x, self.panels, rows, groups, self.num_outputs, out_dtype or x.dtype, self.gate)

    def gated(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        activation: Gate,
        bias: jax.Array | None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        product = self.multiply(x, rows, groups=groups)
        return product if self.gate is not None else gate(product.reshape(len(product), 2, -1), activation, bias)

    def lookup(self, ids: jax.Array) -> jax.Array:
        found = self.panels[ids // cpu_gemm.PANEL, :, ids % cpu_gemm.PANEL]
        return found.reshape(len(ids), -1)[:, : self.num_inputs]


@partial(jax.jit, static_argnames=("kind", "layout"))
def _packed(kind: type[PanelMatrix], weight: jax.Array, layout: MatrixLayout) -> PanelMatrix:
    if layout.is_grouped:
        dense = weight.mT if weight.ndim == 3 else jnp.concatenate(weight.mT, axis=-2)
    else:
        dense = weight.reshape(math.prod(weight.shape[: layout.num_outputs]), -1)
    outputs, inputs = dense.shape[-2:]
    if layout.gate not in cpu_gemm.GATES:
        return kind(cpu_gemm.pack(dense), outputs, inputs, None)
    return kind(cpu_gemm.pack_pairs(dense), outputs // 2, inputs, layout.gate)


def gate(halves: jax.Array, activation: Gate, bias: jax.Array | None) -> jax.Array:
    """``[R, 2, inner]`` -> ``[R, inner]``."""
    halves = halves if bias is None else halves + bias
    return activation(halves[:, 0], halves[:, 1])


def layouts_of(state: nnx.State) -> dict[str, MatrixLayout]:
    """By path, of the parameters made by layers.matrix."""
    found = ((path, variable.get_metadata()) for path, variable in nnx.to_flat_state(state))
    return {".".join(map(str, path)): metadata["layout"] for path, metadata in found if "layout" in metadata}


def taken(
    parameters: Mapping[str, jax.Array], layouts: Mapping[str, MatrixLayout], kind: type[Matrix]
) -> list[Parameter]:
    """What programs take of the loaded ``parameters``, in their order: matrices of this kind. One after the other, so
    that memory need not hold two forms of all."""
    return [kind.of(value, layouts[name]) if name in layouts else value for name, value in parameters.items()]


def abstract_taken(
    parameters: Mapping[str, jax.ShapeDtypeStruct], layouts: Mapping[str, MatrixLayout], kind: type[Matrix]
) -> list[jax.ShapeDtypeStruct | Matrix]:
    """What ``taken`` gives, without values."""
    return [kind.abstract(value, layouts[name]) if name in layouts else value for name, value in parameters.items()]
