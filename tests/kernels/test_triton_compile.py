"""The Triton kernels compiled for a Hopper GPU, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY_BYTES = 227 * 1024
"""Of one program on Hopper."""


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[dict[str, Any]]]:
    """Each variant's kernels, compiled in another process: this one has Triton's interpreter."""
    command = [sys.executable, "-m", "tests.kernels.ptxas_report", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    return json.loads(subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def test_registers_and_shared_memory_suffice(kernels: dict[str, list[dict[str, Any]]]) -> None:
    for variant, compiled in kernels.items():
        assert [kernel["kernel"] for kernel in compiled] == ["rotate_and_write", "prefill", "decode", "combine"]
        for kernel in compiled:
            assert kernel["spilled_bytes"] == 0, (variant, kernel)
            assert kernel["shared_bytes"] <= SHARED_MEMORY_BYTES, (variant, kernel)


def test_chunks_use_warpgroups_matrix_instructions(kernels: dict[str, list[dict[str, Any]]]) -> None:
    for variant, compiled in kernels.items():
        (prefill,) = (kernel for kernel in compiled if kernel["kernel"] == "prefill")
        assert prefill["wgmma"] > 0, variant
        assert prefill["mma"] == 0, variant
