"""Triton kernels in jax programs without a GPU: ``jax_triton.triton_call`` on numpy, by Triton's own interpreter.

Needs TRITON_INTERPRET=1 in the environment before triton is imported (tests/conftest.py sets it), and no torch. What a
kernel does not write stays not a number.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

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

ONE_AT_A_TIME = threading.Lock()
"""Launches: devices of a mesh call at once, and the interpreter puts its own language in place while one runs."""


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
        # As on GPUs, where exp2 quietly becomes inf.
        with ONE_AT_A_TIME, np.errstate(over="ignore"):
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


def _binary_op(self: object, one: Any, other: Any, operation: Any) -> Any:
    """The interpreter's own computes with the bits of bfloat16."""
    if one.dtype.scalar != tl.bfloat16 or operation not in (np.add, np.subtract, np.multiply, np.divide):
        return _plain_op(self, one, other, operation)
    numbers = (handle.data.view(ml_dtypes.bfloat16).astype(np.float32) for handle in (one, other))
    result = operation(*numbers).astype(ml_dtypes.bfloat16).view(np.uint16)
    return interpreter.TensorHandle(result, tl.bfloat16)


def _inline_asm(
    self: object, text: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
) -> Any:
    """Of one operand of 16 bits, two in a register, as many of PTX's instructions as kernels use."""
    (operand,) = values
    registers = {"$1": np.ascontiguousarray(operand.data).reshape(-1).view(np.uint32)}
    for name, operands in re.findall(r"(shr|lop3)\.[ub]32 ([^;]+);", text):
        target, *sources = operands.split(", ")
        numbers = [registers[source] if source in registers else np.uint32(int(source, 0)) for source in sources]
        registers[target] = numbers[0] >> numbers[1] if name == "shr" else _lop3(*numbers)
    made = registers["$0"].view("V2").reshape(operand.data.shape)
    dtype = types[0].scalar
    result = interpreter.TensorHandle(made.view(interpreter._get_np_dtype(dtype)), dtype)
    return SimpleNamespace(get_result=lambda _: result)


def _lop3(one: np.ndarray, other: np.ndarray, third: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each bit is that of the table which the three bits number, the first the highest."""
    cases = [
        (one if i & 4 else ~one) & (other if i & 2 else ~other) & (third if i & 1 else ~third)
        for i in range(8)
        if int(table) >> i & 1
    ]
    return functools.reduce(np.bitwise_or, cases)


def _patch_lang(kernel: Any) -> Any:
    """Once a launch, all of the language; the interpreter's own does it for each call of a function, which is slow."""
    if not tl.core.is_builtin(tl.load):
        return interpreter._LangPatchScope()
    return _patch_lang_for(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))


_plain_op = interpreter.InterpreterBuilder.binary_op
_patch_lang_for = interpreter._patch_lang
interpreter._patch_lang = _patch_lang
interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.binary_op = _binary_op
interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
# As in compiled kernels; checks that sums of indices fit into int32 take as long as the rest of a kernel.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """All programs of a launch run at once, anywhere: one goes on until its next atomic operation, then any does."""
    random, launch = np.random.default_rng(seed), interpreter.GridExecutor

    def launch_together(kernel: Any, names: list[str], grid: tuple[int, ...], hooks: list[Any]) -> Any:
        return launch(_Together(kernel, grid, random), names, (1,), hooks)

    with mock.patch.object(interpreter, "GridExecutor", launch_together):
        yield


class _Together:
    """A kernel of one program that is all programs of another; it looks like that one to the interpreter."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], random: np.random.Generator) -> None:
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__
        self.__signature__, self.__annotations__ = inspect.signature(kernel), kernel.__annotations__
        self._kernel, self._random = kernel, random
        self._grid = grid + (1,) * (3 - len(grid))
        self._programs = list(np.ndindex(self._grid))
        self._unfinished = list(range(len(self._programs)))
        self._cores = random.integers(0, len(self._programs), len(self._programs), np.int32)
        self._turns = [threading.Semaphore(0) for _ in self._unfinished]
        self._back = threading.Semaphore(0)
        self._running = 0
        self._failures: list[Exception] = []

    def __call__(self, **arguments: Any) -> None:
        add = interpreter.InterpreterBuilder.create_atomic_rmw

        def switching_add(*operands: Any) -> Any:
            result = add(*operands)
            self._switch()
            return result

        def smid(*_: Any) -> Any:
            found = interpreter.TensorHandle(self._cores[self._running : self._running + 1], tl.int32)
            return SimpleNamespace(get_result=lambda _: found)

        threads = [threading.Thread(target=self._program, args=(i, arguments)) for i in self._unfinished]
        interpreter.interpreter_builder.set_grid_dim(*self._grid)
        builder = interpreter.InterpreterBuilder
        with (
            mock.patch.object(builder, "create_atomic_rmw", switching_add),
            mock.patch.object(builder, "create_inline_asm", smid),
        ):
            for thread in threads:
                thread.start()
            while self._unfinished:
                self._running = int(self._random.choice(self._unfinished))
                interpreter.interpreter_builder.set_grid_idx(*self._programs[self._running])
                self._turns[self._running].release()
                self._back.acquire()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def _program(self, number: int, arguments: dict[str, Any]) -> None:
        self._turns[number].acquire()
        try:
            with np.errstate(over="ignore"):
                self._kernel(**arguments)
        except Exception as failure:
            self._failures.append(failure)
        self._unfinished.remove(number)
        self._back.release()

    def _switch(self) -> None:
        turn = self._turns[self._running]
        self._back.release()
        turn.acquire()
