"""Native matrix products for CPUs, cpu_gemm.cc, by weights that are packed once, when they are loaded.

XLA's float32 products of a few rows take twice as long as reading the weights, and its bfloat16 ones much longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels.native import MULTIPLY, PACK

PANEL = 16
"""Outputs that lie together."""
GATES = ("silu", "gelu_tanh")
"""Activations that a product can end with, in the order of cpu_gemm.cc's Gate, from 1 on."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedMatrix:
    """A matrix ``[outputs, inputs]`` as the product reads it, float32 or bfloat16; only where native.available()."""

    panels: jax.Array
    """``[outputs / PANEL, inputs, PANEL]`` of float32, ``[outputs / PANEL, inputs / 2, PANEL, 2]`` of bfloat16; both
    divisions are rounded up, and what is not in the matrix is zero."""
    num_outputs: int = field(metadata={"static": True})
    num_inputs: int = field(metadata={"static": True})
    gate: str | None = field(default=None, metadata={"static": True})
    """One of GATES: there are two matrices, and the product is ``gate(x @ first.T) * (x @ second.T)``."""
    wanted: jax.Array | None = None
    """``int32[R]``: which rows of x to multiply, see ``multiply``. None: all."""

    @classmethod
    def of(cls, weight: jax.Array, num_output_axes: int = 1, gate: str | None = None) -> PackedMatrix:
        """``[out..., in...]``, the first ``num_output_axes`` of which are outputs; with a gate ``[2, out, in]``."""
        outputs = math.prod(weight.shape[:num_output_axes])
        weight = weight.reshape(outputs, -1)
        inputs = weight.shape[1]
        if gate is not None:
            outputs //= 2
            weight = _paired(weight.reshape(2, outputs, inputs))
        num_panels = -(-len(weight) // PANEL)
        shape = (num_panels, -(-inputs // 2), PANEL, 2) if weight.dtype == jnp.bfloat16 else (num_panels, inputs, PANEL)
        pack = jax.ffi.ffi_call(PACK, jax.ShapeDtypeStruct(shape, weight.dtype))
        return cls(pack(weight), outputs, inputs, gate)

    def limited_to(self, wanted: jax.Array) -> PackedMatrix:
        return replace(self, wanted=wanted)

    def multiply(self, x: jax.Array, out_dtype: jnp.dtype | None = None, wanted: jax.Array | None = None) -> jax.Array:
        """``x[wanted] @ matrix.T``: ``[T, inputs]`` of the matrix's type -> ``[R, outputs]`` of it, or of float32.

        wanted: ``int32[R]``; where it is negative the result is whatever was in memory. Sums are float32, and a row's
        do not depend on the other rows.
        """
        wanted = self.wanted if wanted is None else wanted
        wanted = jnp.arange(len(x), dtype=jnp.int32) if wanted is None else wanted
        call = jax.ffi.ffi_call(MULTIPLY, jax.ShapeDtypeStruct((len(wanted), self.num_outputs), out_dtype or x.dtype))
        return call(x, self.panels, wanted, gate=np.int64(0 if self.gate is None else 1 + GATES.index(self.gate)))

    def rows(self, numbers: jax.Array) -> jax.Array:
        """Rows ``numbers`` ``int32[T]`` of the matrix, ``[T, inputs]``: of an embedding that is the output head too."""
        found = self.panels[numbers // PANEL, :, numbers % PANEL]
        return found.reshape(len(numbers), -1)[:, : self.num_inputs]


def _paired(weight: jax.Array) -> jax.Array:
    """``[2, out, in]`` -> ``[2 * out, in]``: half a panel of the first matrix, then half a panel of the second."""
    half = PANEL // 2
    padded = jnp.pad(weight, ((0, 0), (0, -weight.shape[1] % half), (0, 0)))
    return padded.reshape(2, -1, half, weight.shape[2]).swapaxes(0, 1).reshape(-1, weight.shape[2])
