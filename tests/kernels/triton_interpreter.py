"""Triton kernels in jax programs without a GPU: ``jax_triton.triton_call`` on numpy, by Triton's own interpreter.

Needs TRITON_INTERPRET=1 in the environment before triton is imported (tests/conftest.py sets it), and no torch. What a
kernel does not write stays not a number.
"""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NUMPY_TYPES = {
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float16: np.dtype(np.float16),
    tl.float32: np.dtype(np.float32),
}


class Tensor:
    """An array behind as much of torch.Tensor's face as the interpreter looks at; it is its own storage."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def new_empty(self, size: int, device: str) -> Tensor:
        return Tensor(np.empty(size, self.dtype))

    def set_(self, storage: Tensor, offset: None, size: None, stride: None) -> None:
        self.array = storage.array

    def storage_offset(self) -> None: ...

    def size(self) -> None: ...

    def stride(self) -> None: ...

    def copy_(self, other: Tensor) -> None:
        """Kernels work on the array itself, so nothing has to come back."""


def triton_call(
    *args: jax.Array | None,
    kernel: Any,
    out_type: Any,
    grid: tuple[int, ...],
    input_output_aliases: dict[int, int],
    **options: Any,
) -> Any:
    """As jax_triton.triton_call: outputs that alias no input are the kernel's last parameters but its constants.

    ``options`` that are no parameters of the kernel, which concern compilers, are dropped.
    """
    out_types, out_tree = jax.tree.flatten(out_type)
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    present = [arg is not None for arg in args]

    def run(*arrays: jax.Array) -> list[np.ndarray]:
        operands = [np.array(array) for array in arrays]
        aliased = {output: operands[operand] for operand, output in input_output_aliases.items()}
        outputs = [aliased[i] if i in aliased else _unwritten(out) for i, out in enumerate(out_types)]
        filled = iter(operands)
        parameters = [Tensor(next(filled)) if given else None for given in present]
        parameters += [Tensor(output) for i, output in enumerate(outputs) if i not in aliased]
        with np.errstate(over="ignore"):  # as on GPUs, where exp2 quietly becomes inf
            kernel[grid](*parameters, **constants)
        return outputs

    found = jax.pure_callback(run, out_types, *(arg for arg in args if arg is not None))
    return jax.tree.unflatten(out_tree, found)


def _unwritten(out: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.full(out.shape, np.nan, out.dtype)


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    """Bits to bits, to the nearest even as GPUs do; the interpreter's own cuts bfloat16 off, and misrounds float8."""
    converted = np.ascontiguousarray(data).view(NUMPY_TYPES[source]).astype(NUMPY_TYPES[target])
    return converted.view(f"uint{target.primitive_bitwidth}")


def _dot(self: object, a: Any, b: Any, accumulator: Any, *precision: object) -> Any:
    """A product with float32 sums; the interpreter's own multiplies the bits of bfloat16."""
    x, y = (handle.data.view(NUMPY_TYPES[handle.dtype]).astype(np.float32) for handle in (a, b))
    return interpreter.TensorHandle(x @ y + accumulator.data, accumulator.dtype.scalar)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _dot
