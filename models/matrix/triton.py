"""Matrices of groups for GPUs, whose products are Triton's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import gpu_gemm
from jaxserve.kernels.backend import Target
from jaxserve.models.matrix.layout import Gate, MatrixLayout, gate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TritonGroups:
    """As they are loaded, in kernels/gpu_gemm.py's products, which cost what their rows do; XLA's cost as much as if
    all rows met all matrices."""

    weight: jax.Array
    layout: MatrixLayout = field(metadata={"static": True})
    target: Target = field(metadata={"static": True})

    skips_padding: ClassVar[bool] = True

    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        return self._product(x, rows, out_dtype, groups, None)

    def gated(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        activation: Gate,
        bias: jax.Array | None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        if self.layout.gate in gpu_gemm.GATES:
            return self._product(x, rows, None, groups, self.layout.gate)
        halves = self._product(x, rows, None, groups, None)
        return gate(halves.reshape(len(halves), 2, -1), activation, bias)

    def lookup(self, ids: jax.Array) -> jax.Array:
        return self.weight[ids]

    def _product(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        out_dtype: jnp.dtype | None,
        groups: jax.Array | None,
        gate: str | None,
    ) -> jax.Array:
        assert groups is not None
        return gpu_gemm.multiply(x, self.weight, rows, groups, out_dtype or x.dtype, gate, self.target)


class TritonKind(NamedTuple):
    """Makes them for a device."""

    target: Target

    @property
    def skips_padding(self) -> bool:
        return TritonGroups.skips_padding

    def of(self, weight: jax.Array, layout: MatrixLayout) -> TritonGroups:
        return TritonGroups(weight, layout, self.target)

    def abstract(self, weight: jax.ShapeDtypeStruct, layout: MatrixLayout) -> TritonGroups:
        return TritonGroups(weight, layout, self.target)  # type: ignore[arg-type]
