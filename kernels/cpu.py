"""Native paged attention for CPUs: C++ behind ``jax.ffi``, built on first use where a C++ compiler is at hand.

It does what kernels/xla.py does, in float32, faster: no gathered copies of the cache, and vector code that XLA does not
find for such small products. Without a compiler everything works in plain XLA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np

from jaxserve.config import cache_dir
from jaxserve.kernels.plan import AttentionPlan

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_attention.cc")
TARGET = "jaxserve_paged_attention"
COMPILERS = ("c++", "g++", "clang++")
# -ffast-math for vectorised exp; the link is a step of its own, without it, because it would make the whole process
# flush denormal numbers to zero.
COMPILE_FLAGS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-fPIC", "-w")
LINK_FLAGS = ("-shared", "-lm")
NO_WINDOW = np.iinfo(np.int32).max
"""A window that every position lies in."""


@functools.cache
def available() -> bool:
    """Build (once for each source, compiler and processor), load and register the kernels; False where that fails."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        logger.warning("no C++ compiler found: attention on this CPU runs in plain XLA, which is slower")
        return False
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (subprocess.CalledProcessError, OSError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("native CPU kernels cannot be built, attention runs in plain XLA: %s", reason)
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(getattr(library, TARGET)), platform="cpu")
    return True


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """See kernels.xla.paged_attention; float32 only, and only where ``available()``."""
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q, k_pages, v_pages, tables, plan.decode, plan.prefill, plan.counts,
        scale=np.float32(scale),
        window=np.int64(NO_WINDOW if window is None else window),
        softcap=np.float32(0.0 if softcap is None else softcap),
    )  # fmt: skip


def _build(compiler: str) -> Path:
    """The shared library, from the user's cache folder or built into it."""
    flags = [*COMPILE_FLAGS, f"-I{jax.ffi.include_dir()}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    recipe = "\n".join([SOURCE.read_text(), *COMPILE_FLAGS, *LINK_FLAGS, version, jax.__version__, _processor()])
    library = cache_dir() / "native" / f"cpu_attention-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects, made = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            for command in (
                [compiler, *flags, "-c", str(SOURCE), "-o", str(objects)],
                [compiler, str(objects), *LINK_FLAGS, "-o", str(made)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            # Processes that build at the same time replace each other's file by an equal one.
            os.replace(made, library)
    return library


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "unknown")
