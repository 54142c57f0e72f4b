"""Matrices for a CPU's native products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxserve.kernels import cpu_gemm
from jaxserve.models.matrix.layout import Gate, MatrixLayout, gate


class Gated(ABC):
    """Panels whose product ends with ``gate``, or with none."""

    num_outputs: int
    gate: str | None

    @abstractmethod
    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        """See Matrix."""

    def gated(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        activation: Gate,
        bias: jax.Array | None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        product = self.multiply(x, rows, groups=groups)
        return (
            product if self.gate is not None else gate(product.reshape(-1, 2, self.num_outputs // 2), activation, bias)
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PanelMatrix(Gated):
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
