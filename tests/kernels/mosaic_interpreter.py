"""Mosaic GPU kernels without a GPU: jax's interpreter, and what it lacks.

In jax 0.11 it multiplies only operands in memory, while the left one of wgmma may be in registers; and it does not
check whether what wgmma reads is being overwritten. This matches its source: gpu_callbacks.py, TcGen05Mma.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels called here are interpreted; what they do not write is not a number. Fails if they had races.

    Leaves the interpreter as it was before, also after a kernel that failed.
    """
    gpu_callbacks.reset_gpu_interpret_mode_state()
    # Of pseudo-threads, so that a copy's is not another's that the first may race with.
    parameters = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
    try:
        with mock.patch.object(gpu_callbacks, "wgmma", _wgmma), plgpu.force_gpu_interpret_mode(parameters):
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
