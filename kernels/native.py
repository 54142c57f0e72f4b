"""Building the native CPU kernels: C++ behind ``jax.ffi``, compiled on first use where a C++ compiler is at hand.

Without one everything works in plain XLA.
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
import jax.numpy as jnp

from jaxserve.config import cache_dir
from jaxserve.kernels.backend import Target

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
HEADER = "cpu_common.h"
SOURCES = "cpu_attention.cc", "cpu_gemm.cc", "cpu_recurrent.cc", "cpu_rotate.cc"
ATTENTION, PACK, MULTIPLY, ROTATE_AND_WRITE, RECUR = TARGETS = (
    "jaxserve_paged_attention",
    "jaxserve_pack",
    "jaxserve_multiply",
    "jaxserve_rotate_and_write",
    "jaxserve_recur",
)
COMPILERS = ("c++", "g++", "clang++")
# Sums keep their order, so that they do not depend on the number of rows; ISO mode alone would not fuse them.
FLAGS = "-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-shared", "-w"


def serves(target: Target, dtype: jnp.dtype) -> bool:
    """Whether C++ computes in ``dtype`` on a device. Where it can be built, it is."""
    return target.platform == "cpu" and dtype in (jnp.float32, jnp.bfloat16) and available()


@functools.cache
def available() -> bool:
    """Build (once for each source, compiler and processor), load and register the kernels; False where that fails."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        logger.warning("no C++ compiler found: attention and matrix products run in plain XLA, which is slower on CPUs")
        return False
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (subprocess.CalledProcessError, OSError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("native CPU kernels cannot be built, plain XLA runs instead: %s", reason)
        return False
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True


def _build(compiler: str) -> Path:
    """The shared library, from the user's cache folder or built into it."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [(FOLDER / name).read_text() for name in (HEADER, *SOURCES)]
    recipe = "\n".join([*texts, *FLAGS, version, jax.__version__, _processor()])
    library = cache_dir() / "native" / f"kernels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "kernels.so"
            sources = [str(FOLDER / name) for name in SOURCES]
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(made)]
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
