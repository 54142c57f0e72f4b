"""Building the native CPU kernels: C++ behind ``jax.ffi``, compiled on first use where a C++ compiler is at hand.

Without one everything works in plain XLA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.config import cache_dir
from jaxserve.kernels.backend import Target
from jaxserve.kernels.instruction_sets import InstructionSet, candidates_here

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = "cpu_attention.cc", "cpu_codes.cc", "cpu_gemm.cc", "cpu_norm.cc", "cpu_recurrent.cc", "cpu_rotate.cc"
ADD, ATTENTION, PACK, MULTIPLY, MULTIPLY_CODES, NORM, ROTATE_AND_WRITE, RECUR = TARGETS = (
    "jaxserve_add",
    "jaxserve_paged_attention",
    "jaxserve_pack",
    "jaxserve_multiply",
    "jaxserve_multiply_codes",
    "jaxserve_norm",
    "jaxserve_rotate_and_write",
    "jaxserve_recur",
)
COMPILERS = ("c++", "g++", "clang++")
# Sums keep their order, so that they do not depend on the number of rows; ISO mode alone would not fuse them.
FLAGS = "-O3", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-w"


def serves(target: Target, dtype: jnp.dtype) -> bool:
    """Whether C++ computes in ``dtype`` on a device. Where it can be built, it is."""
    return target.platform == "cpu" and dtype in (jnp.float32, jnp.bfloat16) and available()


@functools.cache
def instruction_set() -> InstructionSet | None:
    """The best one that both processor and compiler know; None without a compiler. Raises ConfigError where one is
    forced that the processor does not run."""
    wanted, compiler = candidates_here(), _compiler()
    if compiler is None:
        return None
    return next((one for one in wanted if _knows(compiler, one)), wanted[-1])


@functools.cache
def available() -> bool:
    """Build (once for each source, compiler and set of instructions), load and register the kernels; False where that
    fails. Raises ConfigError, see ``instruction_set``."""
    compiler, instructions = _compiler(), instruction_set()
    if compiler is None or instructions is None:
        logger.warning("no C++ compiler found: attention and matrix products run in plain XLA, which is slower on CPUs")
        return False
    try:
        library = ctypes.CDLL(str(_build(compiler, instructions)))
    except (subprocess.CalledProcessError, OSError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("native CPU kernels cannot be built, plain XLA runs instead: %s", reason)
        return False
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    logger.info("native CPU kernels: %s", instructions.name)
    return True


def _compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _knows(compiler: str, instructions: InstructionSet) -> bool:
    try:
        _run([compiler, *instructions.flags, "-fsyntax-only", "-x", "c++", os.devnull])
    except subprocess.CalledProcessError:
        return False
    return True


def _build(compiler: str, instructions: InstructionSet) -> Path:
    """The shared library, from the user's cache folder or built into it, its sources side by side."""
    flags = *FLAGS, *instructions.flags
    texts = [path.read_text() for path in (*sorted(FOLDER.glob("cpu_*.h")), *(FOLDER / name for name in SOURCES))]
    recipe = "\n".join([*texts, *flags, _run([compiler, "--version"]), jax.__version__, platform.machine()])
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    library = cache_dir() / "native" / f"kernels-{instructions.name}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor(len(SOURCES)) as threads:
            made = Path(folder) / "kernels.so"
            objects = [str(Path(folder) / f"{Path(name).stem}.o") for name in SOURCES]
            command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", "-c"]
            each = [[*command, str(FOLDER / name), "-o", made] for name, made in zip(SOURCES, objects, strict=True)]
            list(threads.map(_run, each))
            _run([compiler, "-shared", *objects, "-o", str(made)])
            # Processes that build at the same time replace each other's file by an equal one.
            os.replace(made, library)
    return library
