"""Quantised matrices for a CPU's native products."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxserve.kernels import cpu_codes, cpu_gemm
from jaxserve.models.matrix.panel import Gated
from jaxserve.models.matrix.quantised import QuantisedMatrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PanelCodes(Gated):
    """``codes * scales + offsets``, or ``(codes - zero) * scales``, in the panels of kernels/cpu_codes.py.

    On one device, as PanelMatrix is.
    """

    codes: jax.Array
    """See cpu_codes.pack."""
    scales: jax.Array
    """See cpu_codes.pack_floats; float16 or float32."""
    offsets: jax.Array | None
    """As the scales."""
    order: jax.Array | None
    """``int32[in]``, the input of each column of codes; None: its own."""
    num_outputs: int = field(metadata={"static": True})
    num_inputs: int = field(metadata={"static": True})
    gate: str | None = field(metadata={"static": True})
    """As PanelMatrix's."""
    zero: int = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})
    """Of the weights that ``lookup`` gives."""
    is_int8: bool = field(default=False, metadata={"static": True})
    """Whether products round x to 8 bits."""

    skips_padding: ClassVar[bool] = True

    @classmethod
    def holds(cls, matrix: QuantisedMatrix) -> bool:
        """Whether it has codes and groups that products are there for."""
        packs = cpu_codes.packs(matrix.bits, matrix.group)
        return packs and matrix.codes.dtype == jnp.uint8 and matrix.division is None

    @classmethod
    def of(cls, matrix: QuantisedMatrix, *, is_int8: bool = False) -> Self:
        """From one that it ``holds``, whose arrays are deleted, but for the order."""
        arrays = replace(matrix, order=None)
        made: Self = jax.block_until_ready(_packed(cls, arrays))
        for array in jax.tree.leaves(arrays):
            array.delete()
        return replace(made, order=matrix.order, is_int8=is_int8)

    @classmethod
    def abstract(cls, matrix: QuantisedMatrix, *, is_int8: bool = False) -> Self:
        """What ``of`` gives, without values."""
        return replace(jax.eval_shape(partial(_packed, cls), matrix), is_int8=is_int8)

    def multiply(
        self,
        x: jax.Array,
        rows: jax.Array | None = None,
        out_dtype: jnp.dtype | None = None,
        groups: jax.Array | None = None,
    ) -> jax.Array:
        """Sums are float32, and a row's do not depend on the other rows."""
        x = x if self.order is None else x[:, self.order]
        rows = jnp.arange(len(x), dtype=jnp.int32) if rows is None else rows
        return cpu_codes.multiply(
            x, self.codes, self.scales, self.offsets, rows, self.num_outputs, out_dtype or x.dtype, self.gate,
            self.zero, self.is_int8,
        )  # fmt: skip

    def lookup(self, ids: jax.Array) -> jax.Array:
        def found(array: jax.Array) -> jax.Array:
            return array[ids // cpu_gemm.PANEL, :, ids % cpu_gemm.PANEL]

        bits = self.codes.shape[1] * cpu_codes.UNIT_BITS // self.num_inputs
        codes, scales = cpu_codes.unpack(found(self.codes), bits), found(self.scales)[..., None].astype(jnp.float32)
        grouped = codes.astype(jnp.float32).reshape(*scales.shape[:2], -1)
        if self.offsets is None:
            grouped = (grouped - self.zero) * scales
        else:
            grouped = grouped * scales + found(self.offsets)[..., None].astype(jnp.float32)
        values = grouped.reshape(codes.shape).astype(self.dtype)
        return values if self.order is None else jnp.zeros_like(values).at[:, self.order].set(values)


@partial(jax.jit, static_argnames="kind")
def _packed[K: PanelCodes](kind: type[K], matrix: QuantisedMatrix) -> K:
    num_outputs, num_inputs = math.prod(matrix.codes.shape[:-1]), matrix.scales.shape[-1] * matrix.group
    gate = matrix.layout.gate if matrix.layout.gate in cpu_gemm.GATES else None

    def rows(array: jax.Array) -> jax.Array:
        flat = array.reshape(num_outputs, -1)
        return flat if gate is None else cpu_gemm.in_turns(flat)

    def floats(array: jax.Array) -> jax.Array:
        return cpu_codes.pack_floats(rows(array if array.dtype == jnp.float16 else array.astype(jnp.float32)))

    offsets = matrix.minima
    if matrix.zeros is not None or (matrix.minima is not None and matrix.zero):
        zeros = matrix.zero if matrix.zeros is None else matrix.zeros.astype(jnp.float32)
        minima = 0 if matrix.minima is None else matrix.minima.astype(jnp.float32)
        offsets = minima - zeros * matrix.scales.astype(jnp.float32)
    return kind(
        cpu_codes.pack(rows(matrix.codes), matrix.bits), floats(matrix.scales),
        None if offsets is None else floats(offsets), matrix.order,
        num_outputs=num_outputs if gate is None else num_outputs // 2, num_inputs=num_inputs, gate=gate,
        zero=matrix.zero, dtype=matrix.dtype,
    )  # fmt: skip
