"""What matrices share that are codes in memory: the order of their columns, and their division among devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxserve.models.matrix.layout import Gate, gate


@dataclass(frozen=True)
class Division:
    """Of a matrix among devices, those of ``mesh`` along its axis tensor."""

    mesh: Mesh
    outputs: tuple[str | None, ...]
    """Which of its output dimensions they share."""
    inputs: str | None
    """Whether they share its inputs."""

    @property
    def num_shares(self) -> int:
        """Of the inputs."""
        return 1 if self.inputs is None else self.mesh.shape[self.inputs]

    def spec(self) -> PartitionSpec:
        """Of an array ``[outputs..., in]``."""
        return PartitionSpec(*self.outputs, self.inputs)


class CodedMatrix(ABC):
    """A Matrix, whose kinds say what a device does for a product with its share."""

    order: jax.Array | None
    """``int32[in]``, the input of each column of codes; None: its own."""
    division: Division | None

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

    def _product(self, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """``[T, in]`` -> ``[T, outputs...]``."""
        x = x if self.order is None else x[:, self.order]
        matrix = replace(self, order=None)  # type: ignore[type-var]
        if self.division is None:
            return matrix._share(x, out_dtype)
        division = self.division

        def share(matrix: Self, x: jax.Array) -> jax.Array:
            partial_sums = matrix._share(x, out_dtype)
            return partial_sums if division.inputs is None else jax.lax.psum(partial_sums, division.inputs)

        return jax.shard_map(
            share, mesh=division.mesh, in_specs=(matrix._specs(division), PartitionSpec(None, division.inputs)),
            out_specs=PartitionSpec(None, *division.outputs), check_vma=False,
        )(matrix, x)  # fmt: skip

    @abstractmethod
    def _specs(self, division: Division) -> Self:
        """What each device has of each array, where there is no order."""

    @abstractmethod
    def _share(self, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """``_product`` of what one device has, without an order."""
