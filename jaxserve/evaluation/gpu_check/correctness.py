"""The kernels of every variant of attention against dense attention in float64, each run thrice on poisoned memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax

from jaxserve.evaluation.attention_batch import attention_errors, random_batch, rotation_error
from jaxserve.evaluation.attention_variants import VARIANTS
from jaxserve.evaluation.gpu_check.stage import Context, StageFailed
from jaxserve.evaluation.kernel_bench import MOST_ERROR
from jaxserve.kernels.backend import Backend, Target
from jaxserve.kernels.cache import is_quantised
from jaxserve.kernels.registry import GPU_BACKENDS, choose_backend

RUNS = 3
MOST_FLOAT8_ERROR = 5e-2
"""Of what is written to a float8 cache: its numbers have three bits behind the first."""
SEQUENCES = ((5000, 1), (0, 1), (4095, 1), (300, 1), (0, 70), (1000, 130), (5000, 150), (63, 2))
"""(context, rows): decodes and chunks on both sides of a window of 4,096 and of pages' ends, long ones split; 356 rows,
28 of padding."""
TINY_SEQUENCES = ((40, 1), (0, 1), (30, 9), (0, 5))
TINY_VARIANTS = ("16/8 x 256, window, soft cap",)
MOST_PROCESSES = 8


def run(context: Context) -> None:
    """In as many processes as compile quickly; without a GPU in this one."""
    cases = list(context.arguments) or _cases(context.tiny)
    if context.tiny or context.arguments:
        right = [_check(context, *case.split("/", 1)) for case in cases]
    else:
        with ThreadPoolExecutor(min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))) as pool:
            right = list(pool.map(partial(_check_apart, context), cases))
    if not all(right):
        raise StageFailed(f"{right.count(False)} of {len(right)} are wrong")


def _cases(tiny: bool) -> list[str]:
    """backend/variant, of those that the device's kernels serve."""
    if tiny:
        return [f"xla/{name}" for name in TINY_VARIANTS]
    return [f"{backend}/{name}" for backend in GPU_BACKENDS for name in VARIANTS if _backend(backend, name) is not None]


def _backend(backend: str, name: str) -> Backend | None:
    try:
        return choose_backend(backend, Target.of(jax.devices()[0]), VARIANTS[name].shape)
    except ValueError:
        return None


def _check_apart(context: Context, case: str) -> bool:
    """In a process of its own: a kernel that reads where it must not ends all work of its process on the device."""
    command = [
        sys.executable, "-m", "jaxserve.evaluation.gpu_check.worker", context.name, "correctness", case,
        "--out", str(context.out), "--seconds", str(context.left_seconds),
    ]  # fmt: skip
    code = subprocess.run(command).returncode
    if code < 0:  # by a signal: it could not say so itself
        backend, name = case.split("/", 1)
        context.records.add("correctness", backend=backend, variant=name, failure=f"ended by signal {-code}")
    return code == 0


def _check(context: Context, backend: str, name: str) -> bool:
    record = partial(context.records.add, "correctness", backend=backend, variant=name)
    start = time.monotonic()
    try:
        errors, rotation = _measure(backend, name, tiny=context.tiny)
    except Exception as failure:  # whatever a kernel does, the others must be checked
        record(failure=f"{type(failure).__name__}: {failure}"[:500])
        return False
    most = MOST_FLOAT8_ERROR if is_quantised(VARIANTS[name].shape.cache_dtype) else MOST_ERROR
    right = max(errors) <= MOST_ERROR and rotation <= most and len(set(errors)) == 1
    finite = [error if math.isfinite(error) else None for error in (*errors, rotation)]  # None: rows left out
    record(errors=finite[:-1], rotation_error=finite[-1], right=right, seconds=round(time.monotonic() - start, 1))
    return right


def _measure(backend: str, name: str, *, tiny: bool) -> tuple[list[float], float]:
    """Errors of attention, and of rotating and writing."""
    variant = VARIANTS[name]
    batch = random_batch(
        TINY_SEQUENCES if tiny else SEQUENCES,
        variant.shape,
        choose_backend(backend, Target.of(jax.devices()[0]), variant.shape),
        window=variant.window,
        chunk=variant.chunk,
        softcap=variant.softcap,
        has_sinks=variant.has_sinks,
        rotated=variant.rotated,
        poison=100.0 if tiny else math.nan,  # xla reads what it masks, and multiplies it by 0
        cache_bytes=0,
        seed=list(VARIANTS).index(name),
    )
    return attention_errors(batch, RUNS), rotation_error(batch)
