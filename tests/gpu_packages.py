"""Environments for processes that compile for GPUs, whose packages lie in folders of their own beside the tests'.

In the environment itself XLA's CUDA plugin would be loaded by every program that uses jax, and on a machine without a
GPU complain each time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PLUGIN = Path(sys.prefix) / "aot"
TRITON_36 = Path(sys.prefix) / "triton-3.6"
"""The Triton that images for GPUs carry, older than the tests' own."""
OF_THE_TESTS = ("JAX_PLATFORMS", "TRITON_INTERPRET", "XLA_FLAGS")
"""Environment of tests/conftest.py."""


def environment(*, triton_36: bool = False) -> dict[str, str]:
    """For a process that compiles for an absent GPU, with the tests' Triton or version 3.6."""
    variables = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
    folders = list(map(str, [TRITON_36, PLUGIN] if triton_36 else [PLUGIN]))
    assert all(map(os.path.isdir, folders)), f"make setup installs packages into {' and '.join(folders)}"
    if inherited := os.environ.get("PYTHONPATH"):
        folders.append(inherited)
    return variables | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PYTHONPATH": os.pathsep.join(folders)}
