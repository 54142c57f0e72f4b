"""The steps of models of full width, compiled for H100s on a machine without a GPU by scripts/aot_report.py.

Mistral-7B has all its layers, the larger ones have a few: more are the same again.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.engine.memory import working_bytes
from jaxserve.errors import ConfigError
from jaxserve.evaluation.aot import DEVICES, absent_mesh
from jaxserve.evaluation.compiled import computations, moved_bytes
from jaxserve.kernels.backend import AttentionShape
from jaxserve.kernels.plan import PlanLimits
from jaxserve.kernels.registry import choose_backend
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.presets import PRESETS
from tests import gpu_packages

pytestmark = pytest.mark.timeout(1800)
"""Two programs of ten seconds each, or thirty on a busy machine, and a sampler of twice as many, for each model."""

PROGRAMS = Path(__file__).with_name("gpu_programs.py")
SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_report.py"
ROWS = (16, 2048)
"""Of the nineteen token buckets; the script compiles all by default."""
YI_LAYERS, FALCON_LAYERS, SHALLOW_LAYERS = 2, 4, 2
FEW_SEQUENCES = "--max-num-seqs=16"
"""So that all buckets draw from one sampler."""
BFLOAT16 = jnp.dtype("bfloat16")
OF_ATTENTION = {"attend", "combine", "rotate_and_write"}
"""Triton's kernels."""


def run(environment: dict[str, str], *command: str) -> str:
    """What a Python program prints."""
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def compiled(folder: Path, *arguments: str, triton_36: bool = False) -> dict[str, Any]:
    """What the script reports."""
    path = folder / "report.json"
    run(gpu_packages.environment(triton_36=triton_36), str(SCRIPT), *arguments, "--output", str(path))
    return json.loads(path.read_text())


def shallow_model(folder: Path, preset: str, layers: int, **others: int) -> str:
    """The flag for a model like ``preset``, but of so many layers, and with ``others`` of its sizes."""
    (folder / "config.json").write_text(json.dumps(PRESETS[preset] | {"num_hidden_layers": layers} | others))
    return f"--model={folder}"


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Mistral-7B on one device, with the smallest and the largest bucket."""
    return compiled(tmp_path_factory.mktemp("mistral"), FEW_SEQUENCES, "--rows", *map(str, ROWS))


@pytest.fixture(scope="module")
def yi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layers of Yi-34B on two devices, with the smallest and the largest bucket."""
    folder = tmp_path_factory.mktemp("yi")
    model = shallow_model(folder, "yi-34b", YI_LAYERS)
    return compiled(folder, model, FEW_SEQUENCES, "--tensor-parallel=2", "--token-budget=512", "--rows", "16", "512")


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layers of Falcon-180B on two hosts of four devices, each a stage."""
    folder = tmp_path_factory.mktemp("falcon")
    model = shallow_model(folder, "falcon-180b", FALCON_LAYERS)
    mesh = ("--tensor-parallel=4", "--pipeline-parallel=2", "--hosts=2")
    rows = ("--rows", "512", "--kinds", "forward")
    return compiled(folder, model, "--max-model-len=2048", *mesh, "--token-budget=512", *rows)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layers of Mistral-7B in a bucket of 128 rows, with the Triton of GPU images and cuBLASLt's products alone."""
    folder = tmp_path_factory.mktemp("shallow")
    model = shallow_model(folder, "mistral-7b", SHALLOW_LAYERS)
    rows = ("--rows", "128", "--kinds", "forward")
    return compiled(folder, model, "--gemm-backend=cublaslt", *rows, triton_36=True)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A narrow model whose steps verify drafts and propose the next ones, in a bucket of 64 rows."""
    folder = tmp_path_factory.mktemp("drafting")
    narrow = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 1}
    model = shallow_model(folder, "mistral-7b", SHALLOW_LAYERS, **narrow)
    return compiled(folder, model, FEW_SEQUENCES, "--speculative=ngram", "--rows", "64")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Layers of Qwen3-30B-A3B, of a small vocabulary, in a bucket of decodes and one of chunks."""
    folder = tmp_path_factory.mktemp("mixture")
    model = shallow_model(folder, "qwen3-30b-a3b", SHALLOW_LAYERS, vocab_size=2048)
    return compiled(folder, model, FEW_SEQUENCES, "--rows", *map(str, ROWS), "--kinds", "forward")


@pytest.fixture(params=["mistral", "yi", "falcon", "shallow", "drafting"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def forward_passes(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [program for program in report["programs"] if program["kind"] == "forward"]


def most_temp_bytes(rows: int, settings: dict[str, Any]) -> int:
    """Temporary memory that a forward pass may take of a device: for the last layer."""
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
    # Kernels of a graph that share no data may run at once, so what one has left is not always room for the next.
    return rows_bytes + partial_bytes + 2**20


def most_sampling_bytes(num_draws: int, settings: dict[str, Any]) -> int:
    """Logits as they come and by rows, relative to the largest and scaled, and what is left of them; what a search of
    them sums up, which counts where draws are few."""
    model = open_checkpoint(settings["model"], "dummy").config
    return num_draws * (5 * model.vocab_size // settings["tensor_parallel"] * 4 + 2**18)


def test_the_cache_is_changed_in_place(report: dict[str, Any]) -> None:
    for program in report["programs"]:
        assert program["alias_bytes"] == program["donated_bytes"], program["rows"]
        assert program["num_cache_copies"] == 0, program["rows"]


def test_temporary_memory_is_what_activations_take(report: dict[str, Any]) -> None:
    settings = report["settings"]
    model = open_checkpoint(settings["model"], "dummy").config
    divided = dataclasses.replace(model, tensor_parallel=settings["tensor_parallel"])
    kept_free = working_bytes(SimpleNamespace(**settings), divided)  # type: ignore[arg-type]
    for program in report["programs"]:
        bound = most_temp_bytes if program["kind"] == "forward" else most_sampling_bytes
        assert program["temp_bytes"] <= bound(program["rows"], settings), program["rows"]
        assert program["temp_bytes"] <= kept_free, program["rows"]


def test_nothing_is_computed_again(report: dict[str, Any]) -> None:
    """XLA would, believing that there is no room: it counts the donated cache more than once."""
    assert {program["num_rematerialized"] for program in report["programs"]} == {0}


def test_kernels_of_a_layer(mistral: dict[str, Any], shallow: dict[str, Any]) -> None:
    """Twelve: four of attention, four products, two norms, an activation, an addition of residuals.

    Where rows are few, XLA splits three of the products and puts each together in a kernel of its own, of which one
    had been there. cuBLASLt's products add the residual themselves.
    """
    for program in forward_passes(mistral):
        most = 14 if program["rows"] <= 384 else 12
        assert program["num_layer_kernels"] <= most * program["num_layers"], program["rows"]
    (program,) = forward_passes(shallow)
    assert program["num_layer_kernels"] <= 11 * program["num_layers"]


def test_what_a_step_of_decodes_moves(mistral: dict[str, Any]) -> None:
    """Little but the weights; a fifth more where the parts of split products are written and read again, and arrays of
    attention's partial results, of which a step uses what it splits but which count whole."""
    for program in forward_passes(mistral):
        if program["rows"] <= 128:
            weight_bytes = program["argument_bytes"] - program["donated_bytes"]
            assert program["moved_bytes"] <= 1.45 * weight_bytes, program["rows"]


def test_the_triton_of_gpu_images(shallow: dict[str, Any]) -> None:
    assert shallow["versions"]["triton"].startswith("3.6.")


def test_on_one_device_a_step_is_two_cuda_graphs(
    mistral: dict[str, Any], shallow: dict[str, Any], drafting: dict[str, Any]
) -> None:
    for report, buckets, draws in ((mistral, ROWS, (16,)), (shallow, (128,), ()), (drafting, (64,), (48,))):
        launches = {(program["kind"], program["rows"]): program["launches"] for program in report["programs"]}
        expected = [("forward", rows) for rows in buckets] + [("sample", num_draws) for num_draws in draws]
        assert launches == {program: {"num_graphs": 1, "num_others": 0, "num_waits": 0} for program in expected}


def test_no_branch_is_outside_of_graphs(report: dict[str, Any]) -> None:
    """At each the host would wait for the device in the middle of a step."""
    assert {program["launches"]["num_waits"] for program in report["programs"]} == {0}


def test_layers_run_in_triton_kernels(report: dict[str, Any]) -> None:
    """Prefill, decode, combine, and rotate and write, for each layer of a stage."""
    for program in forward_passes(report):
        calls = {target: count for target, count in program["custom_calls"].items() if "cublas" not in target}
        assert calls == {"triton_kernel_call_ffi": 4 * program["num_layers"]}, program["rows"]


def test_a_mixture_multiplies_what_its_rows_choose(mixture: dict[str, Any]) -> None:
    """In kernels of its own, two a layer, where XLA would multiply all rows by all experts, each masked for itself; the
    step stays one graph, and its memory what rows and their experts make."""
    model = open_checkpoint(mixture["settings"]["model"], "dummy").config
    kept_free = working_bytes(SimpleNamespace(**mixture["settings"]), model)  # type: ignore[arg-type]
    for program in forward_passes(mixture):
        assert program["custom_calls"] == {"triton_kernel_call_ffi": 6 * program["num_layers"]}
        assert program["num_layer_kernels"] <= 27 * program["num_layers"]
        assert program["temp_bytes"] <= kept_free
        assert program["launches"] == {"num_graphs": 1, "num_others": 0, "num_waits": 0}
    assert {kernel["name"] for kernel in mixture["kernels"]} == OF_ATTENTION | {"multiply_groups"}
    assert max(kernel["spilled_bytes"] for kernel in mixture["kernels"]) <= 16


def test_collectives_of_tensor_parallelism(yi: dict[str, Any]) -> None:
    """Two all-reduces a layer and the embedding's; an exchange of logits; tokens and logprobs, gathered at once."""
    for program in yi["programs"]:
        if program["kind"] == "sample":
            assert program["collectives"] == {"all-to-all": 1, "all-gather": 1}
            continue
        assert program["num_layers"] == YI_LAYERS
        assert program["layer_collectives"] == {"all-reduce": 2 * YI_LAYERS}
        assert program["collectives"] == {"all-reduce": 2 * YI_LAYERS + 1}


def test_collectives_of_a_tick(falcon: dict[str, Any]) -> None:
    """Attention and MLP in one all-reduce; rows handed on; the last stage's drawn rows, and how to sample them."""
    (program,) = forward_passes(falcon)
    stage_layers = FALCON_LAYERS // 2
    assert program["num_layers"] == stage_layers
    assert program["layer_collectives"] == {"all-reduce": stage_layers}
    assert program["collectives"] == {"all-reduce": stage_layers + 3, "collective-permute": 1}


def test_all_reduces_of_layers_stay_on_a_host(falcon: dict[str, Any]) -> None:
    assert falcon["hosts"] == [[0] * 4, [1] * 4]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two starts on a GPU, of a compiled sampler, and of steps with codes; see gpu_programs.py."""
    folder = tmp_path_factory.mktemp("start")
    run(gpu_packages.environment() | {"PYTHONHASHSEED": "1"}, str(PROGRAMS), str(folder), "first")
    run(gpu_packages.environment() | {"PYTHONHASHSEED": "2"}, str(PROGRAMS), str(folder), "second", "more")
    return folder


def test_a_second_start_finds_what_the_first_has_tuned(start: Path) -> None:
    """XLA keeps what it measures beside compiled programs, and a step is found under the same key."""
    (options,) = (start / "first").glob("*jit_product*.debug_options")
    kept = start / "cache" / "xla_gpu_per_fusion_autotune_cache_dir"
    assert f'xla_gpu_per_fusion_autotune_cache_dir: "{kept}"' in options.read_text()
    assert 'xla_disable_hlo_passes: "rematerialization"' in options.read_text()
    assert len([path for path in (start / "cache").iterdir() if path.name.startswith("jit_product")]) == 1
    assert (start / "first" / "step.mlir").read_bytes() == (start / "second" / "step.mlir").read_bytes()


def test_blocks_come_back_from_the_swap_space_in_place(start: Path) -> None:
    temp_bytes, alias_bytes = json.loads((start / "first" / "swap.json").read_text())
    assert temp_bytes == 0
    assert alias_bytes > 2**29, "the whole cache"


def test_top_k_and_top_p_read_a_large_vocabulary_few_times(start: Path) -> None:
    """Loops over the candidates, which are a sixteenth of it, in two kernels; then, if need be, over all in one."""
    rows, vocab = 128, 131072
    program = computations((start / "second" / "sampler.txt").read_text())
    loops = [each for computation in program.values() for each in computation.values() if each.opcode == "while"]
    passes: dict[int, list[float]] = {8192: [], vocab: []}
    for loop in loops:
        searched = next(shape for _, shape in loop.types if len(shape) == 2)
        body = re.search(r"body=%([\w.\-]+)", loop.text)
        assert body is not None
        passes[searched[1]].append(moved_bytes(program[body[1]]) / (rows * vocab * 4))
    assert passes[8192] == [pytest.approx(2 / 16, rel=0.1)] * 2
    assert passes[vocab] == [pytest.approx(1, rel=0.1)] * 2


def test_steps_with_quantised_weights(start: Path) -> None:
    """One graph too, and no matrix is numbers as a whole: all that steps need besides is less than the largest."""
    few, *many = json.loads((start / "second" / "codes.json").read_text())
    for program in (few, *many):
        assert program["launches"] == [1, 0, 0]
        assert program["alias_bytes"] == program["donated_bytes"]
        assert program["temp_bytes"] < 2 * 28672 * 4096, program["rows"]
    kernels = [program["custom_calls"]["triton_kernel_call_ffi"] / program["num_layers"] for program in (few, *many)]
    assert kernels == [8, 4, 4], "of attention, and four of few rows' products"


def test_a_missing_plugin_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs XLA's CUDA plugin, .*; make aot ARGS="):
        absent_mesh(DEVICES["h100"])


def test_stages_must_divide_over_the_hosts() -> None:
    with pytest.raises(ConfigError, match="hosts must divide the 2 stages of pipeline_parallel, got 3"):
        absent_mesh(DEVICES["h100"], tensor=2, pipe=2, hosts=3)


def test_no_kernel_spills_registers(report: dict[str, Any]) -> None:
    assert {kernel["name"] for kernel in report["kernels"]} == OF_ATTENTION
    assert [kernel for kernel in report["kernels"] if kernel["spilled_bytes"]] == []
