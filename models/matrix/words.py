"""Matrices of 4-bit codes for a GPU's Triton product."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.kernels import code_words
from jaxserve.kernels.backend import Target, triton_needs
from jaxserve.kernels.code_words import Codes
from jaxserve.models.matrix.coded import CodedMatrix, Division
from jaxserve.models.matrix.layout import MatrixLayout
from jaxserve.models.matrix.quantised import TILE_VALUES, QuantisedMatrix, multiply_in_tiles

BASES = {jnp.dtype("bfloat16"): 128, jnp.dtype("float16"): 1024}
"""By type, the number whose bits a code's are or-ed into; see kernels/triton_codes.py."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WordMatrix(CodedMatrix):
    """As a QuantisedMatrix of 4 bits, whose codes lie in words as kernels/triton_product.py takes them.

    That multiplies up to MOST_ROWS rows. With more, turning a matrix into numbers is a small part of a product, which
    is XLA's then.
    """

    codes: Codes
    """Each device's share of the inputs has blocks of words of its own. Zeros are of type ``dtype``, and larger by
    BASES of it; without, all are ``zero``."""
    order: jax.Array | None
    layout: MatrixLayout = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    """Of one device."""
    group: int = field(metadata={"static": True})
    zero: int = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})
    division: Division | None = field(metadata={"static": True})
    target: Target = field(metadata={"static": True})

    MOST_ROWS: ClassVar[int] = 256

    @classmethod
    def serves(cls, codes: QuantisedMatrix, target: Target) -> bool:
        return (
            triton_needs(target) is None
            and codes.bits == 4
            and codes.dtype in BASES
            and code_words.slice_inputs(codes.group) is not None
        )

    @classmethod
    def of(cls, codes: QuantisedMatrix, target: Target) -> Self:
        placed = jax.tree.map(lambda array: array.sharding, cls.abstract(codes, target))
        packed: Self = jax.jit(partial(_packed, cls, target), out_shardings=placed)(codes)
        return jax.block_until_ready(packed)

    @classmethod
    def abstract(cls, codes: QuantisedMatrix, target: Target) -> Self:
        shapes = jax.eval_shape(partial(_packed, cls, target), codes)
        mesh = codes.codes.sharding.mesh  # type: ignore[attr-defined]
        specs = shapes._specs(codes.division or Division(mesh, (), None))
        return jax.tree.map(
            lambda array, spec: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec)),
            shapes, specs,
        )  # fmt: skip

    def lookup(self, ids: jax.Array) -> jax.Array:
        words, *small = self.codes
        rows = Codes(words[ids], *jax.tree.map(lambda array: array[:, ids].T, small))
        return self._numbers(rows, self.order)

    def _specs(self, division: Division) -> Self:
        small = PartitionSpec(division.inputs, *division.outputs)
        codes: Any = jax.tree.map(lambda _: small, self.codes)._replace(words=division.spec())
        return replace(self, codes=codes, order=None if self.order is None else PartitionSpec())  # type: ignore[arg-type]

    def _share(self, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        words, *small = self.codes
        outputs = words.shape[:-1]
        codes = Codes(words.reshape(math.prod(outputs), -1), *jax.tree.map(lambda a: a.reshape(len(a), -1), small))
        return self._product_of(x.astype(self.dtype), codes, out_dtype).reshape(len(x), *outputs)

    def _product_of(self, x: jax.Array, codes: Codes, out_dtype: jnp.dtype) -> jax.Array:
        """``[T, in]`` -> ``[T, outputs]``, by codes with one dimension of outputs."""
        if len(x) > self.MOST_ROWS:
            words, *small = codes
            rows = Codes(words, *jax.tree.map(jnp.transpose, small))
            return multiply_in_tiles(x, rows, self._numbers, TILE_VALUES[self.target.platform], out_dtype)
        from jaxserve.kernels.triton_product import multiply  # it needs packages that only GPUs do

        zero = BASES[self.dtype] + self.zero
        return multiply(
            x, codes, inputs=self._slice_inputs, group=self.group, zero=zero, out_dtype=out_dtype, target=self.target
        )

    def _numbers(self, rows: Codes, order: jax.Array | None = None) -> jax.Array:
        """``[R, in]``; of codes whose every array is ``[R, ...]``."""
        words, scales, zeros, minima = rows
        by_share = words.reshape(len(words), -1, code_words.num_words(self.inputs, self._slice_inputs))
        codes = code_words.unpack(by_share, self._slice_inputs)[..., : self.inputs].reshape(len(words), -1)
        return QuantisedMatrix(
            codes, scales, None if zeros is None else zeros - BASES[self.dtype], minima, order, layout=self.layout,
            bits=8, group=self.group, zero=self.zero, dtype=self.dtype, division=None,
        ).numbers()  # fmt: skip

    @property
    def _slice_inputs(self) -> int:
        inputs = code_words.slice_inputs(self.group)
        assert inputs is not None, "serves"
        return inputs


def _packed(kind: type[WordMatrix], target: Target, codes: QuantisedMatrix) -> WordMatrix:
    division, base = codes.division, BASES[codes.dtype]
    shares = 1 if division is None else division.num_shares
    *outputs, num_bytes = codes.codes.shape
    by_share = codes.codes.reshape(*outputs, shares, num_bytes // shares)
    slice_inputs = code_words.slice_inputs(codes.group)
    assert slice_inputs is not None, "serves"

    small = jax.tree.map(lambda array: jnp.moveaxis(array, -1, 0), (codes.scales, codes.zeros, codes.minima))
    packed = Codes(code_words.pack(by_share, slice_inputs).reshape(*outputs, -1), *small)
    if packed.zeros is not None:
        packed = packed._replace(zeros=packed.zeros.astype(codes.dtype) + base)
    return kind(
        codes=packed, order=codes.order, layout=codes.layout, inputs=2 * num_bytes // shares, group=codes.group,
        zero=codes.zero, dtype=codes.dtype, division=division, target=target,
    )  # fmt: skip
