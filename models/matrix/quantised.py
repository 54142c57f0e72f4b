"""Matrices in memory as codes of 4 or 8 bits, which are turned into numbers in every product, a few rows at a time.

A product is XLA's, on any device. It is slower than one of dense weights, which it writes out each time, and takes a
quarter or half of bfloat16's memory. Where a CPU has native products, PanelCodes are made of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxserve.kernels.backend import Target
from jaxserve.models.matrix.coded import CodedMatrix, Division
from jaxserve.models.matrix.layout import Matrix, MatrixLayout

TILE_VALUES = {"cpu": 1 << 20, "gpu": 1 << 24}
"""Of a matrix, that are numbers at once, by platform: what stays in a cache, and is enough for all of a GPU's
multiprocessors."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantisedMatrix(CodedMatrix):
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
    tile_values: int = field(default=TILE_VALUES["cpu"], metadata={"static": True})

    @classmethod
    def serves(cls, codes: QuantisedMatrix, target: Target) -> bool:
        return True

    @classmethod
    def of(cls, codes: QuantisedMatrix, target: Target) -> QuantisedMatrix:
        return replace(codes, tile_values=TILE_VALUES[target.platform])

    @classmethod
    def abstract(cls, codes: QuantisedMatrix, target: Target) -> QuantisedMatrix:
        return cls.of(codes, target)

    def lookup(self, ids: jax.Array) -> jax.Array:
        found = jax.tree.map(lambda array: array[ids], replace(self, order=None))
        return replace(found, order=self.order).numbers()

    def numbers(self) -> jax.Array:
        """``[R, in]`` of a matrix ``[R, in]``."""
        codes = self.codes
        if self.bits == 4:
            codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
        grouped = codes.astype(jnp.float32).reshape(len(codes), -1, self.group) - self.zero
        if self.zeros is not None:
            grouped = grouped - self.zeros[..., None].astype(jnp.float32)
        grouped = grouped * self.scales[..., None].astype(jnp.float32)
        if self.minima is not None:
            grouped = grouped + self.minima[..., None].astype(jnp.float32)
        found = grouped.reshape(codes.shape).astype(self.dtype)
        return found if self.order is None else jnp.zeros_like(found).at[:, self.order].set(found)

    def _specs(self, division: Division) -> QuantisedMatrix:
        return jax.tree.map(lambda _: division.spec(), self)

    def _share(self, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        outputs = self.codes.shape[:-1]
        flat = jax.tree.map(lambda array: array.reshape(math.prod(outputs), -1), self)
        product = multiply_in_tiles(x, flat, QuantisedMatrix.numbers, self.tile_values, out_dtype)
        return product.reshape(len(x), *outputs)


class CodedKind(Matrix, Protocol):
    """A Matrix that is made of codes as files are read into."""

    @classmethod
    def serves(cls, codes: QuantisedMatrix, target: Target) -> bool:
        """Whether it can be made of these, which may be without values, for a device."""
        ...

    @classmethod
    def of(cls, codes: QuantisedMatrix, target: Target) -> Matrix: ...

    @classmethod
    def abstract(cls, codes: QuantisedMatrix, target: Target) -> Matrix:
        """What ``of`` gives, without values."""
        ...


def multiply_in_tiles[T](
    x: jax.Array, matrix: T, numbers: Callable[[T], jax.Array], tile_values: int, out_dtype: jnp.dtype
) -> jax.Array:
    """``[T, in]`` -> ``[T, R]``, by a matrix that is a tree of arrays ``[R, ...]``, so many rows at a time as have
    ``tile_values``. ``numbers`` makes ``[n, in]`` of n rows."""
    num_rows = len(jax.tree.leaves(matrix)[0])
    tile = max(1, min(num_rows, tile_values // x.shape[1]))

    def product(part: T) -> jax.Array:
        return jax.lax.dot_general(x, numbers(part), (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)

    def step(number: jax.Array, y: jax.Array) -> jax.Array:
        # The last ones overlap those before, where the rows are no multiple of a tile's.
        first = jnp.minimum(number * tile, num_rows - tile)
        part = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, tile), matrix)
        return jax.lax.dynamic_update_slice_in_dim(y, product(part), first, axis=1)

    if tile == num_rows:
        return product(matrix)
    # A loop also of few turns: kernels of a CUDA graph that share no data may run at once, and then all tiles would be
    # in memory.
    return jax.lax.fori_loop(0, -(-num_rows // tile), step, jnp.zeros((len(x), num_rows), out_dtype))
