"""Native matrix products for CPUs, cpu_gemm.cc, by weights that are packed once, when they are loaded.

XLA's float32 products of a few rows take twice as long as reading the weights, and its bfloat16 ones much longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxserve.kernels.native import MULTIPLY, PACK

PANEL = 16
"""Outputs that lie together."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedMatrix:
    """A matrix ``[outputs, inputs]`` as the product reads it, float32 or bfloat16; only where native.available()."""

    panels: jax.Array
    """``[outputs / PANEL, inputs, PANEL]`` of float32, ``[outputs / PANEL, inputs / 2, PANEL, 2]`` of bfloat16; both
    divisions are rounded up, and what is not in the matrix is zero."""
    num_outputs: int = field(metadata={"static": True})
    num_inputs: int = field(metadata={"static": True})

    @classmethod
    def of(cls, weight: jax.Array, num_output_axes: int = 1) -> PackedMatrix:
        """``[out..., in...]``, the first ``num_output_axes`` of which are outputs."""
        outputs = math.prod(weight.shape[:num_output_axes])
        inputs = weight.size // outputs
        num_panels = -(-outputs // PANEL)
        shape = (num_panels, -(-inputs // 2), PANEL, 2) if weight.dtype == jnp.bfloat16 else (num_panels, inputs, PANEL)
        pack = jax.ffi.ffi_call(PACK, jax.ShapeDtypeStruct(shape, weight.dtype))
        return cls(pack(weight.reshape(outputs, inputs)), outputs, inputs)

    def multiply(self, x: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """``x @ matrix.T``: ``[T, inputs]`` of the matrix's type -> ``[T, outputs]`` of it, or of float32.

        Sums are float32, and a row's do not depend on the other rows.
        """
        call = jax.ffi.ffi_call(MULTIPLY, jax.ShapeDtypeStruct((x.shape[0], self.num_outputs), out_dtype or x.dtype))
        return call(x, self.panels)

    def rows(self, numbers: jax.Array) -> jax.Array:
        """Rows ``numbers`` ``int32[T]`` of the matrix, ``[T, inputs]``: of an embedding that is the output head too."""
        found = self.panels[numbers // PANEL, :, numbers % PANEL]
        return found.reshape(len(numbers), -1)[:, : self.num_inputs]
