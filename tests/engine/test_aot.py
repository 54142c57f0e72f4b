"""The steps of models of full size, compiled for H100s on a machine without a GPU by scripts/aot_report.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.config import ConfigError
from jaxserve.evaluation.aot import DEVICES, absent_mesh
from jaxserve.kernels.backend import AttentionShape, choose_backend
from jaxserve.kernels.plan import PlanLimits
from jaxserve.models.loading.checkpoint import open_checkpoint

pytestmark = pytest.mark.timeout(1800)
"""Seven programs of seven seconds each, or twenty on a busy machine, and three of twice as many."""

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_report.py"
ROWS = (16, 64, 128, 384, 640, 1024, 2048)
"""Of the nineteen token buckets; the script compiles all by default."""
OF_THE_TESTS = ("JAX_PLATFORMS", "TRITON_INTERPRET", "XLA_FLAGS")
"""Environment of tests/conftest.py."""
BFLOAT16 = jnp.dtype("bfloat16")


def compiled(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the script reports."""
    path = folder / "report.json"
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
    command = [sys.executable, str(SCRIPT), *arguments, "--output", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Mistral-7B on one device, from the smallest token bucket to the largest."""
    return compiled(tmp_path_factory.mktemp("mistral"), "--rows", *map(str, ROWS))


@pytest.fixture(scope="module")
def yi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Yi-34B on two devices, with the smallest and the largest bucket."""
    return compiled(
        tmp_path_factory.mktemp("yi"),
        "--model=yi-34b", "--tensor-parallel=2", "--token-budget=512", "--rows", "16", "512",
    )  # fmt: skip


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Falcon-180B on two hosts of four devices, each a stage."""
    return compiled(
        tmp_path_factory.mktemp("falcon"), "--model=falcon-180b", "--max-model-len=2048", "--tensor-parallel=4",
        "--pipeline-parallel=2", "--hosts=2", "--token-budget=512", "--rows", "512",
    )  # fmt: skip


@pytest.fixture(params=["mistral", "yi", "falcon"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def most_temp_bytes(rows: int, settings: dict[str, Any]) -> int:
    """Temporary memory that a step may take of a device: its largest moment, the MLP or the sampling."""
    model = open_checkpoint(settings["model"], "dummy").config
    share = settings["tensor_parallel"]
    heads, kv_heads, inner = (n // share for n in (model.num_heads, model.num_kv_heads, model.intermediate_size))
    # Residual, and normed rows or the result; what the MLP is wide, before and after activation; cosines and sines.
    rows_bytes = rows * 2 * (2 * model.hidden_size + (3 if model.gated_mlp else 2) * inner)
    rows_bytes += rows * model.head_dim * 4
    # Values and stats of split tiles, float32. They may outlive the attention by an unlucky placement.
    shape = AttentionShape(heads, kv_heads, model.head_dim, settings["block_size"], BFLOAT16, BFLOAT16)
    tiling = choose_backend("triton", DEVICES["h100"].target, shape).tiling
    sizes = settings["max_num_seqs"], settings["max_model_len"], settings["block_size"], settings["num_blocks"]
    partial_bytes = PlanLimits(rows, *sizes, tiling).max_partial_rows * heads * (model.head_dim + 2) * 4
    # Sampling: logits, what is left of them, their integer keys and their probabilities.
    logits_bytes = settings["max_num_seqs"] * model.vocab_size // share * 4
    return max(rows_bytes + partial_bytes + logits_bytes, 4 * logits_bytes) + 2**20


def test_the_cache_is_changed_in_place(report: dict[str, Any]) -> None:
    for program in report["programs"]:
        assert program["alias_bytes"] == program["donated_bytes"], program["rows"]
        assert program["num_cache_copies"] == 0, program["rows"]


def test_temporary_memory_is_what_activations_take(report: dict[str, Any]) -> None:
    for program in report["programs"]:
        assert program["temp_bytes"] <= most_temp_bytes(program["rows"], report["settings"]), program["rows"]


def test_a_step_on_one_device_is_one_cuda_graph(mistral: dict[str, Any]) -> None:
    launches = {program["rows"]: program["launches"] for program in mistral["programs"]}
    assert launches == {rows: {"num_graphs": 1, "num_others": 0, "num_waits": 0} for rows in ROWS}


def test_no_branch_is_outside_of_graphs(report: dict[str, Any]) -> None:
    """At each the host would wait for the device in the middle of a step."""
    assert {program["launches"]["num_waits"] for program in report["programs"]} == {0}


def test_layers_run_in_triton_kernels(report: dict[str, Any]) -> None:
    """Prefill, decode, combine, and rotate and write, for each layer of a stage."""
    for program in report["programs"]:
        assert program["custom_calls"] == {"triton_kernel_call_ffi": 4 * program["num_layers"]}, program["rows"]


def test_collectives_of_tensor_parallelism(yi: dict[str, Any]) -> None:
    """Two all-reduces a layer and the embedding's; an exchange of logits; tokens and logprobs, gathered at once."""
    for program in yi["programs"]:
        assert program["num_layers"] == 60
        assert program["layer_collectives"] == {"all-reduce": 2 * 60}
        assert program["collectives"] == {"all-reduce": 2 * 60 + 1, "all-to-all": 1, "all-gather": 1}


def test_collectives_of_a_tick(falcon: dict[str, Any]) -> None:
    """Attention and MLP in one all-reduce; rows handed on; the last stage's sampling rows, and how to sample them."""
    (program,) = falcon["programs"]
    assert program["num_layers"] == 40
    assert program["layer_collectives"] == {"all-reduce": 40}
    assert program["collectives"] == {"all-reduce": 40 + 3, "collective-permute": 1, "all-to-all": 1, "all-gather": 1}


def test_all_reduces_of_layers_stay_on_a_host(falcon: dict[str, Any]) -> None:
    assert falcon["hosts"] == [[0] * 4, [1] * 4]


def test_stages_must_divide_over_the_hosts() -> None:
    with pytest.raises(ConfigError, match="hosts must divide the 2 stages of pipeline_parallel, got 3"):
        absent_mesh(DEVICES["h100"], tensor=2, pipe=2, hosts=3)


def test_no_kernel_spills_registers(report: dict[str, Any]) -> None:
    assert {kernel["name"] for kernel in report["kernels"]} == {"attend", "combine", "rotate_and_write"}
    assert [kernel for kernel in report["kernels"] if kernel["spilled_bytes"]] == []
