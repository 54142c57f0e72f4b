"""Mosaic GPU kernels without a GPU: jax's interpreter, and what it lacks.

In jax 0.11 it multiplies only operands in memory, while the left one of wgmma may be in registers; and it does not
check whether what wgmma reads is being overwritten. This matches its source: gpu_callbacks.py, TcGen05Mma.

It is also slow, by what is mended here: it puts every operand of a callback on a device, compiles each block's threads
anew, with all of LLVM's optimisations, and compares each access to memory with each earlier one in Python.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret.race_detection_state import _ranges_overlap
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""Of programs that mostly call Python."""


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels called here are interpreted; what they do not write is not a number. Fails if they had races.

    Leaves the interpreter as it was before, also after a kernel that failed.
    """
    gpu_callbacks.reset_gpu_interpret_mode_state()
    # Of pseudo-threads, so that a copy's is not another's that the first may race with.
    parameters = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
    try:
        with ExitStack() as patches:
            for module, name, ours in (
                (gpu_callbacks, "wgmma", _wgmma),
                (gpu_callbacks, "GPURaceDetectionState", RaceDetectionState),
                (callback, "io_callback_impl", _io_callback),
                (shared_memory, "_to_int", _to_int),
                (thread_map, "_run_jaxpr", _run_jaxpr),
            ):
                patches.enter_context(mock.patch.object(module, name, ours))
            patches.enter_context(plgpu.force_gpu_interpret_mode(parameters))
            yield
        assert not gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@gpu_callbacks.fail_on_exception
def _wgmma(
    *,
    token: jax.Array,
    mesh_location: Any,
    thread: Any,
    acc_allocation_key_as_array: jax.Array,
    acc_transforms: tuple[Any, ...],
    a_allocation_key_as_array: jax.Array,
    a_transforms: tuple[Any, ...],
    b_allocation_key_as_array: jax.Array,
    b_transforms: tuple[Any, ...],
    source_info: Any = None,
) -> jax.Array:
    """acc += a @ b, where ``a`` may also be the array itself."""
    memory = gpu_callbacks._get_shared_memory()
    clock = memory.incr_clock(thread)
    logging_info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)

    def place(key: jax.Array, transforms: tuple[Any, ...]) -> tuple[Any, Any]:
        found = gpu_callbacks.HostAllocationKey.from_array(key)
        return found, memory.access(found, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))

    def read(key: Any, access: Any) -> np.ndarray:
        gpu_callbacks.get_races().check_read(thread, clock.async_smem_clock, key, access, source_info=source_info)
        value, _, _ = memory.get_buffer_content(key, access, thread, logging_info=logging_info)
        return value.astype(np.float32)

    in_registers = a_allocation_key_as_array.ndim == 2
    if in_registers:
        a = np.asarray(a_allocation_key_as_array, np.float32)
    else:
        a = read(*place(a_allocation_key_as_array, a_transforms))
    b = read(*place(b_allocation_key_as_array, b_transforms))
    accumulator = place(acc_allocation_key_as_array, acc_transforms)
    before, _, _ = memory.get_buffer_content(*accumulator, thread, logging_info=logging_info)
    with np.errstate(invalid="ignore"):  # rows that hold nothing
        after = before + a @ b
    memory.store_buffer_content(*accumulator, after, thread, logging_info=logging_info)
    return token


class Access(NamedTuple):
    """To a buffer."""

    thread: Any
    clock: Any
    """Of vectors, when it happened."""
    range: tuple[slice | int, ...]
    number: tuple[int, ...] | None
    """The range where it is a single number; the kernel writes stats so, thousands of them."""
    source: Any

    def may_meet(self, other: Access) -> bool:
        return self.number is None or other.number is None or self.number == other.number


class RaceDetectionState(GPURaceDetectionState):
    """Two accesses to the same numbers race if one of them writes and no clock is before the other's."""

    def check_read(self, thread: Any, clock: Any, buffer_key: Any, rnge: Any, source_info: Any = None) -> None:
        self._check(_access(thread, clock, rnge, source_info), buffer_key, self.reads, [self.writes])

    def check_write(self, thread: Any, clock: Any, buffer_key: Any, rnge: Any, source_info: Any = None) -> None:
        self._check(_access(thread, clock, rnge, source_info), buffer_key, self.writes, [self.writes, self.reads])

    def _check(
        self, access: Access, buffer: Any, kept_in: dict[Any, list[Access]], others: list[dict[Any, list[Access]]]
    ) -> None:
        with self.lock:
            earlier = [other for kind in others for other in kind[buffer] if access.may_meet(other)]
            kept_in[buffer].append(access)
        if not earlier:
            return
        ahead = np.array([other.clock.clock for other in earlier]) - access.clock.clock
        ordered = (ahead.max(axis=1) <= 0) != (ahead.min(axis=1) >= 0)
        for other in (earlier[i] for i in np.flatnonzero(~ordered)):
            if _ranges_overlap(access.range, other.range):
                print(f"RACE DETECTED in {buffer}: {access} and {other}")
                self.races_found = True


def _access(thread: Any, clock: Any, rnge: Any, source_info: Any) -> Access:
    number = rnge.range if all(isinstance(index, int) for index in rnge.range) else None
    return Access(thread, clock, rnge.range, number, source_info)


def _io_callback(*args: Any, callback: Any, **parameters: Any) -> Any:
    """Calls it with numpy's arrays as they come."""
    return jax.tree.map(np.asarray, callback(*args))


def _to_int(number: Any) -> Any:
    return number if isinstance(number, jax.core.Tracer) else int(number)


_compiling = threading.Lock()


@functools.lru_cache(maxsize=8)
def _compiled(jaxpr: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> jax.stages.Compiled:
    run = jax.jit(thread_map._run, static_argnums=(0,), compiler_options=COMPILER_OPTIONS)
    return run.lower(jaxpr, *shapes).compile()


def _run_jaxpr(jaxpr: Any, consts: Sequence[Any], *args: Any) -> None:
    """One of a block's threads, which all run the same program."""
    operands = tuple(consts), *args
    with _compiling:
        program = _compiled(jaxpr, jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), operands))
    program(*operands)
