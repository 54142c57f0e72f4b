"""Matrices of 8-bit codes whose outputs have a scale each, on GPUs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from jaxserve.kernels.backend import Target
from jaxserve.models.matrix.quantised import QuantisedMatrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowScaledMatrix(QuantisedMatrix):
    """A QuantisedMatrix of one group, whose scales are multiplied with the products.

    What is left of making numbers of codes is a conversion, which XLA does within its own matrix product: codes are all
    that is read, and nothing is written out. Activations stay as they are, so a product is not one of two float8.
    """

    @classmethod
    def serves(cls, codes: QuantisedMatrix, target: Target) -> bool:
        shares = 1 if codes.division is None else codes.division.num_shares
        is_float = jnp.issubdtype(codes.codes.dtype, jnp.floating)
        return (
            target.platform == "gpu"
            and target.compute_capability >= (89 if is_float else 80)  # of the first that has float8
            and (codes.bits, codes.scales.shape[-1]) == (8, shares)
            and codes.zeros is None
            and codes.minima is None
        )

    @classmethod
    def of(cls, codes: QuantisedMatrix, target: Target) -> Self:
        return cls(**{field.name: getattr(codes, field.name) for field in dataclasses.fields(codes)})

    def _share(self, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        outputs = self.codes.shape[:-1]
        numbers = self.codes.reshape(math.prod(outputs), -1).astype(x.dtype) - jnp.asarray(self.zero, x.dtype)
        sums = jax.lax.dot_general(x, numbers, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return (sums * self.scales.reshape(-1).astype(jnp.float32)).astype(out_dtype).reshape(len(x), *outputs)
