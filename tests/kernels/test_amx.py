"""The native kernels for AMX on any x86-64 processor, where plain C++ does what its instructions do (cpu_tiles.h)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxserve.kernels import native
from jaxserve.kernels.instruction_sets import AMX, AMX_EMULATED, AVX512_BF16, VARIABLE, InstructionSet, Processor

FOLDER = Path(__file__).parent
WITH_TILES = {
    "test_cpu_gemm.py": "gates or amx or bfloat16 and (wanted or panel or numbers)",
    "test_attention.py": "native and bfloat16",
    "test_cpu_codes.py": "last_bit or int8 or batch_mates and bfloat16",
}
"""What goes through them."""


needs_compiler = pytest.mark.skipif(native.instruction_set() is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.skipif(not AMX_EMULATED.runs_on(Processor.here()), reason="needs a processor with AVX2")
@pytest.mark.parametrize("file", WITH_TILES)
def test_kernels_for_amx(file: str) -> None:
    """In a process of its own: a library's kernels are registered for good."""
    command = [sys.executable, "-m", "pytest", str(FOLDER / file), "-k", WITH_TILES[file], "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env={**os.environ, VARIABLE: AMX_EMULATED.name}, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("instructions", "source"),
    [*((AMX, source) for source in native.SOURCES), (AVX512_BF16, "cpu_gemm.cc")],
    ids=lambda one: one.name if isinstance(one, InstructionSet) else one,
)
def test_sets_that_this_processor_may_lack_are_compiled(
    instructions: InstructionSet, source: str, tmp_path: Path
) -> None:
    """To machine code, without optimisation. Between them these two have all that others have."""
    compiler = native._compiler()
    assert compiler is not None
    if not native._knows(compiler, instructions):
        pytest.skip(f"{compiler} does not know {' '.join(instructions.flags)}")
    flags = *native.FLAGS, "-O0", *instructions.flags, f"-I{jax.ffi.include_dir()}"
    command = [compiler, *flags, "-c", str(native.FOLDER / source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
