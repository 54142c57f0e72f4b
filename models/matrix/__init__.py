"""The matrices that layers multiply by: what a layer asks of one, whatever its weights look like in memory.

A model declares its matrices as dense parameters (layers.matrix), and so they are loaded and stored. How they lie in
memory is a kind, chosen for the device, and programs take ``kind.of`` of each. What stays the file's own codes is a
QuantisedMatrix, or made of one.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from jaxserve.kernels.backend import Target
from jaxserve.models.matrix.dense import DenseMatrix
from jaxserve.models.matrix.kinds import choose_kind
from jaxserve.models.matrix.layout import DenseKind, Gate, Matrix, MatrixLayout
from jaxserve.models.matrix.panel import PanelMatrix
from jaxserve.models.matrix.panel_codes import PanelCodes
from jaxserve.models.matrix.quantised import CodedKind, QuantisedMatrix
from jaxserve.models.matrix.row_scaled import RowScaledMatrix
from jaxserve.models.matrix.words import WordMatrix

__all__ = [
    "CodedKind", "DenseKind", "DenseMatrix", "Gate", "Matrix", "MatrixLayout", "PanelCodes", "PanelMatrix",
    "Parameter", "QuantisedMatrix", "RowScaledMatrix", "WordMatrix", "abstract_taken", "choose_kind",
    "coded_kind", "layouts_of", "taken",
]  # fmt: skip

Parameter = jax.Array | Matrix
"""What programs take: a matrix of some kind, or the array of anything else."""

CODED_KINDS: tuple[type[CodedKind], ...] = (WordMatrix, RowScaledMatrix, QuantisedMatrix)
"""Of matrices that stay codes, the fastest first. The last serves every one."""


def layouts_of(state: nnx.State) -> dict[str, MatrixLayout]:
    """By path, of the parameters made by layers.matrix."""
    found = ((path, variable.get_metadata()) for path, variable in nnx.to_flat_state(state))
    return {".".join(map(str, path)): metadata["layout"] for path, metadata in found if "layout" in metadata}


def taken(
    parameters: Mapping[str, jax.Array], layouts: Mapping[str, MatrixLayout], kind: DenseKind
) -> dict[str, Parameter]:
    """What programs take of dense ``parameters``: matrices of this kind. One after the other, so that memory need not
    hold two forms of all."""
    return {name: kind.of(value, layouts[name]) if name in layouts else value for name, value in parameters.items()}


def abstract_taken(
    parameters: Mapping[str, jax.ShapeDtypeStruct], layouts: Mapping[str, MatrixLayout], kind: DenseKind
) -> dict[str, jax.ShapeDtypeStruct | Matrix]:
    """What ``taken`` gives, without values."""
    return {
        name: kind.abstract(value, layouts[name]) if name in layouts else value for name, value in parameters.items()
    }


def coded_kind(codes: QuantisedMatrix, target: Target) -> type[CodedKind]:
    """The fastest for these codes on a device, but for PanelCodes, which take more to be chosen."""
    return next(kind for kind in CODED_KINDS if kind.serves(codes, target))
