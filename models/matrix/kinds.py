"""Which kind of matrix a device multiplies by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.kernels import native
from jaxserve.kernels.backend import Target, triton_needs
from jaxserve.models.matrix.dense import DenseMatrix
from jaxserve.models.matrix.layout import DenseKind, Matrix, MatrixLayout
from jaxserve.models.matrix.panel import PanelMatrix
from jaxserve.models.matrix.triton import TritonKind


class ByLayout(NamedTuple):
    """One kind for matrices by themselves, and one for those of groups."""

    single: DenseKind
    grouped: DenseKind

    @property
    def skips_padding(self) -> bool:
        return self.single.skips_padding and self.grouped.skips_padding

    def of(self, weight: jax.Array, layout: MatrixLayout) -> Matrix:
        return self._kind(layout).of(weight, layout)

    def abstract(self, weight: jax.ShapeDtypeStruct, layout: MatrixLayout) -> Matrix:
        return self._kind(layout).abstract(weight, layout)

    def _kind(self, layout: MatrixLayout) -> DenseKind:
        return self.grouped if layout.is_grouped else self.single


def choose_kind(target: Target, dtype: jnp.dtype, mesh: Mesh) -> DenseKind:
    """The fastest for products in ``dtype`` on a mesh of such devices."""
    if mesh.size == 1 and native.serves(target, dtype):
        return PanelMatrix
    return DenseMatrix if triton_needs(target) else ByLayout(DenseMatrix, TritonKind(target))
