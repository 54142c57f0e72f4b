"""Matrices in memory as codes of 4 or 8 bits, which are turned into numbers in every product, a few rows at a time.

A product is XLA's, on any device. It is slower than one of dense weights, which it writes out each time, and takes a
quarter or half of bfloat16's memory. Where a CPU has native products, PanelCodes are made of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxserve.models.matrix.layout import Gate, MatrixLayout, gate

TILE_VALUES = 1 << 20
"""Of a matrix, that are numbers at once."""


@dataclass(frozen=True)
class Division:
    """Of a matrix among devices, those of ``mesh`` along its axis tensor."""

    mesh: Mesh
    outputs: tuple[str | None, ...]
    """Which of its output dimensions they share."""
    inputs: str | None
    """Whether they share its inputs."""

    def spec(self, inputs: str | None) -> PartitionSpec:
        return PartitionSpec(*self.outputs, inputs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantisedMatrix:
    """``(codes - zeros) * scales + minima``, ``[outputs..., in]``; ``group`` inputs of a row share the rest."""

    codes: jax.Array
    """``[outputs..., in]`` of 8 bits, ``uint8`` or a float; of 4 bits ``uint8[outputs..., in / 2]``, the first of two
    inputs in the low half."""
    scales: jax.Array
    """Floats ``[outputs..., in / group]``."""
    zeros: jax.Array | None
    """``uint8``, as the scales; None: all are ``zero``."""
    minima: jax.Array | None
    """As the scales; None: there are none."""
    order: jax.Array | None
    """``int32[in]``, the input of each column of codes; None: its own."""
    layout: MatrixLayout = field(metadata={"static": True})
    bits: int = field(metadata={"static": True})
    group: int = field(metadata={"static": True})
    zero: int = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})
    """Of the weights, when they are numbers."""
    division: Division | None = field(metadata={"static": True})

    skips_padding: ClassVar[bool] = False

    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        product = self._product(x if rows is None else x[rows], out_dtype or x.dtype)
        return product.reshape(len(product), -1)

    def gated(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        activation: Gate,
        bias: jax.Array | None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        return gate(self._product(x if rows is None else x[rows], x.dtype), activation, bias)

    def lookup(self, ids: jax.Array) -> jax.Array:
        found = _numbers(jax.tree.map(lambda array: array[ids], replace(self, order=None)))
        return found if self.order is None else jnp.zeros_like(found).at[:, self.order].set(found)

    def _product(self, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """``[T, in]`` -> ``[T, outputs...]``."""
        x = x if self.order is None else x[:, self.order]
        matrix = replace(self, order=None)
        if self.division is None:
            return _multiply(matrix, x, out_dtype)
        division = self.division
        small = division.spec(division.inputs)
        specs = jax.tree.map(lambda _: small, matrix)

        def share(matrix: QuantisedMatrix, x: jax.Array) -> jax.Array:
            partial_sums = _multiply(matrix, x, out_dtype)
            return partial_sums if division.inputs is None else jax.lax.psum(partial_sums, division.inputs)

        return jax.shard_map(
            share, mesh=division.mesh, in_specs=(specs, PartitionSpec(None, division.inputs)),
            out_specs=PartitionSpec(None, *division.outputs), check_vma=False,
        )(matrix, x)  # fmt: skip


def _multiply(matrix: QuantisedMatrix, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
    """A device's share of ``_product``, as many rows of the matrix at a time as have TILE_VALUES."""
    outputs = matrix.codes.shape[:-1]
    flat = jax.tree.map(lambda array: array.reshape(math.prod(outputs), -1), matrix)
    num_rows, inputs = math.prod(outputs), x.shape[1]
    tile = max(1, min(num_rows, TILE_VALUES // inputs))

    def product(first: jax.Array) -> jax.Array:
        part = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, tile), flat)
        return jax.lax.dot_general(x, _numbers(part), (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)

    def step(number: jax.Array, y: jax.Array) -> jax.Array:
        # The last ones overlap those before, where the rows are no multiple of a tile's.
        first = jnp.minimum(number * tile, num_rows - tile)
        return jax.lax.dynamic_update_slice_in_dim(y, product(first), first, axis=1)

    if tile == num_rows:
        y = product(jnp.int32(0))
    else:
        y = jax.lax.fori_loop(0, -(-num_rows // tile), step, jnp.zeros((len(x), num_rows), out_dtype))
    return y.reshape(len(x), *outputs)


def _numbers(matrix: QuantisedMatrix) -> jax.Array:
    """``[R, in]`` of a matrix whose arrays are ``[R, ...]``."""
    codes = matrix.codes
    if matrix.bits == 4:
        codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    grouped = codes.astype(jnp.float32).reshape(len(codes), -1, matrix.group) - matrix.zero
    if matrix.zeros is not None:
        grouped = grouped - matrix.zeros[..., None].astype(jnp.float32)
    grouped = grouped * matrix.scales[..., None].astype(jnp.float32)
    if matrix.minima is not None:
        grouped = grouped + matrix.minima[..., None].astype(jnp.float32)
    return grouped.reshape(codes.shape).astype(matrix.dtype)
