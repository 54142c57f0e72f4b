"""Weights in the layout that native kernels multiply by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
from flax import nnx

from jaxserve.kernels.cpu_gemm import PackedMatrix

Parameter = jax.Array | PackedMatrix


class Layout(NamedTuple):
    """What PackedMatrix.of takes besides the weight."""

    num_output_axes: int
    gate: str | None


def matrices(state: nnx.State) -> dict[str, Layout]:
    """By path, the parameters made by layers.matrix."""
    found = ((path, variable.get_metadata()) for path, variable in nnx.to_flat_state(state))
    return {
        ".".join(map(str, path)): Layout(metadata["num_outputs"], metadata["gate"])
        for path, metadata in found
        if "num_outputs" in metadata
    }


def packed(parameters: Mapping[str, jax.Array], layouts: Mapping[str, Layout]) -> list[Parameter]:
    """``parameters`` in their order, those in ``layouts`` packed and deleted, one after the other."""
    return [_replaced(value, layouts[name]) if name in layouts else value for name, value in parameters.items()]


def abstract_packed(
    parameters: Mapping[str, jax.ShapeDtypeStruct], layouts: Mapping[str, Layout]
) -> list[jax.ShapeDtypeStruct | PackedMatrix]:
    """What ``packed`` gives, without values."""
    return [
        jax.eval_shape(partial(_pack, layout=layouts[name]), value) if name in layouts else value
        for name, value in parameters.items()
    ]


def limited(parameters: list[Parameter], wanted: jax.Array) -> list[Parameter]:
    """``parameters`` whose packed matrices multiply the rows ``wanted`` only, see PackedMatrix.multiply."""
    return [value.limited_to(wanted) if isinstance(value, PackedMatrix) else value for value in parameters]


def _replaced(weight: jax.Array, layout: Layout) -> PackedMatrix:
    matrix = jax.block_until_ready(_pack(weight, layout))
    weight.delete()
    return matrix


@partial(jax.jit, static_argnames="layout")
def _pack(weight: jax.Array, layout: Layout) -> PackedMatrix:
    return PackedMatrix.of(weight, *layout)
