"""The steps of a model of full size, compiled for an H100 on a machine without a GPU by scripts/aot_report.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.kernels.backend import AttentionShape, Target, choose_backend
from jaxserve.kernels.plan import PlanLimits
from jaxserve.scheduler.buckets import token_buckets

pytestmark = pytest.mark.timeout(1800)
"""Nineteen programs of seven seconds each, or twenty on a busy machine."""

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_report.py"
ROWS = tuple(token_buckets(2048))
OF_THE_TESTS = ("JAX_PLATFORMS", "TRITON_INTERPRET", "XLA_FLAGS")
"""Environment of tests/conftest.py."""
HIDDEN, INNER, VOCAB = 4096, 14336, 32000
SHAPE = AttentionShape(32, 8, 128, 64, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
"""Mistral-7B."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("aot") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
    command = [sys.executable, str(SCRIPT), "--rows", *map(str, ROWS), "--output", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text())


def most_temp_bytes(rows: int, settings: dict[str, Any]) -> int:
    """Temporary memory that a step of Mistral-7B may take: its largest moment, the MLP or the sampling."""
    # Residual, and normed rows or the result; gate and up; their product; cosines and sines of 64 angles.
    rows_bytes = rows * (2 * (2 * HIDDEN + 2 * INNER + INNER) + 2 * 64 * 4)
    # Values and stats of split tiles, float32. They may outlive the attention by an unlucky placement.
    tiling = choose_backend("triton", Target("gpu", 90, 132), SHAPE).tiling
    sizes = settings["max_num_seqs"], settings["max_model_len"], settings["block_size"], settings["num_blocks"]
    partial_bytes = PlanLimits(rows, *sizes, tiling).max_partial_rows * 32 * (128 + 2) * 4
    # Sampling: logits, what is left of them, their integer keys and their probabilities.
    logits_bytes = settings["max_num_seqs"] * VOCAB * 4
    return max(rows_bytes + partial_bytes + logits_bytes, 4 * logits_bytes) + 2**20


def test_the_cache_is_changed_in_place(report: dict[str, Any]) -> None:
    for program in report["programs"]:
        assert program["alias_bytes"] == program["donated_bytes"], program["rows"]
        assert program["num_cache_copies"] == 0, program["rows"]


def test_temporary_memory_is_what_activations_take(report: dict[str, Any]) -> None:
    for program in report["programs"]:
        assert program["temp_bytes"] <= most_temp_bytes(program["rows"], report["settings"]), program["rows"]


def test_a_step_is_one_cuda_graph(report: dict[str, Any]) -> None:
    """Otherwise the host also waits for the device at each branch, in the middle of a step."""
    launches = {program["rows"]: program["launches"] for program in report["programs"]}
    assert launches == {rows: {"num_graphs": 1, "num_others": 0} for rows in ROWS}


def test_layers_run_in_triton_kernels(report: dict[str, Any]) -> None:
    """Prefill, decode, combine, and rotate and write, for each of 32 layers."""
    for program in report["programs"]:
        assert program["custom_calls"] == {"triton_kernel_call_ffi": 4 * 32}, program["rows"]


def test_no_kernel_spills_registers(report: dict[str, Any]) -> None:
    assert {kernel["name"] for kernel in report["kernels"]} == {"attend", "combine", "rotate_and_write"}
    assert [kernel for kernel in report["kernels"] if kernel["spilled_bytes"]] == []
