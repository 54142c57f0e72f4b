"""Weights in the layout that native kernels multiply by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
from flax import nnx

from jaxserve.kernels.cpu_gemm import PackedMatrix

Parameter = jax.Array | PackedMatrix


def matrices(state: nnx.State) -> dict[str, int]:
    """Paths of the parameters made by layers.matrix, and how many of their dimensions are outputs."""
    found = ((path, variable.get_metadata()) for path, variable in nnx.to_flat_state(state))
    return {".".join(map(str, path)): metadata["num_outputs"] for path, metadata in found if "num_outputs" in metadata}


def packed(parameters: Mapping[str, jax.Array], num_outputs: Mapping[str, int]) -> list[Parameter]:
    """``parameters`` in their order, those in ``num_outputs`` packed and deleted, one after the other."""
    return [_replaced(value, num_outputs[name]) if name in num_outputs else value for name, value in parameters.items()]


def abstract_packed(
    parameters: Mapping[str, jax.ShapeDtypeStruct], num_outputs: Mapping[str, int]
) -> list[jax.ShapeDtypeStruct | PackedMatrix]:
    """What ``packed`` gives, without values."""
    return [
        jax.eval_shape(partial(PackedMatrix.of, num_output_axes=num_outputs[name]), value)
        if name in num_outputs
        else value
        for name, value in parameters.items()
    ]


def _replaced(weight: jax.Array, num_outputs: int) -> PackedMatrix:
    matrix = jax.block_until_ready(_pack(weight, num_outputs))
    weight.delete()
    return matrix


@partial(jax.jit, static_argnums=1)
def _pack(weight: jax.Array, num_outputs: int) -> PackedMatrix:
    return PackedMatrix.of(weight, num_outputs)
