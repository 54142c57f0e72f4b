"""The page about GPUs: rendered from records, beside what was predicted, with the command to fill it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve.evaluation.gpu_check import predictions
from jaxserve.evaluation.gpu_check.counters import read_counters
from jaxserve.evaluation.gpu_check.predictions import CEILINGS, H100_STEPS
from jaxserve.evaluation.gpu_check.records import read_records
from jaxserve.evaluation.gpu_check.report import render
from jaxserve.evaluation.gpu_check.stage import ROOT
from jaxserve.evaluation.gpu_check.wheels import describe_wheels, missing_wheels, read_packages
from jaxserve.evaluation.step_bench import step_cases

SCRIPT = ROOT / "scripts" / "gpu_check.py"
WHEELS = {"gguf": "0.19.0"}


def test_the_page_is_what_its_command_makes() -> None:
    script = runpy.run_path(str(SCRIPT))
    kept = script["PAGES"] / script["KEPT"]
    wheels = missing_wheels(ROOT, read_packages(script["IMAGE"]))
    page = render(read_records(kept) if kept.is_file() else [], wheels, script["IMAGE_PYTHON"])
    assert page == (script["PAGES"] / "gpu.md").read_text(encoding="utf-8"), "python scripts/gpu_check.py --report"


def test_a_report_keeps_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPT))
    pages, out = tmp_path / "pages", tmp_path / "out"
    pages.mkdir()
    out.mkdir()
    (out / "results.jsonl").write_text('{"time": 1, "stage": "machine", "kind": "stage", "status": "passed"}\n')
    monkeypatch.setitem(script["report"].__globals__, "PAGES", pages)
    assert script["report"](out) == 0
    page = (pages / "gpu.md").read_text()
    assert "| machine | 30 | - | passed |" in page
    (out / "results.jsonl").unlink()
    assert script["report"](pages) == 0
    assert (pages / "gpu.md").read_text() == page


def record(kind: str, stage: str = "stage", **data: Any) -> dict[str, Any]:
    return {"time": 1.0, "stage": stage, "kind": kind, **data}


def product(rows: int, kind: str, **data: Any) -> dict[str, Any]:
    return record("product", pair="MLP", rows=rows, product=kind, **data)


def correctness(variant: str, backend: str = "triton", **data: Any) -> dict[str, Any]:
    return record("correctness", variant=variant, backend=backend, **data)


def attention(**data: Any) -> dict[str, Any]:
    usual = {"backend": "triton", "variant": "", "plain": True, "window": None, "failure": None, "error": 2e-3,
             "case": "decode-64x4k", "floor_seconds": 300e-6, "seconds": {"median": 400e-6}}  # fmt: skip
    return record("attention", **usual | data)


def test_measurements_stand_beside_predictions() -> None:
    facts = {"devices": "NVIDIA H100 80GB HBM3", "jax": "0.11.2"}
    page = render(
        [
            record("machine", facts=facts, gpu="H100, 580", ptxas=None, ncu=None, bytes_limit=60),
            record("ceilings", copy_bytes_per_second=2.9e12, matmul_flops_per_second=700e12),
            record("stage", "machine", status="passed", seconds=11.0),
            record("failure", "steps", message="RuntimeError: out of memory"),
            record("graphs", check="top-k", equal=False),
            record("golden", checkpoint="mistral_window", right=True),
            correctness("window", errors=[2e-3] * 3, rotation_error=3e-3, right=True),
            correctness("window", backend="mosaic", failure="ended by signal 6"),
            correctness("group 1", errors=[None] * 3, rotation_error=0, right=False),
            attention(),
            attention(window=4096, variant="window 4096", seconds={"median": 500e-6}),
            attention(case="hybrid", seconds=None, error=None, failure="RuntimeError: out of registers"),
            attention(variant="264 programs", plain=False, seconds={"median": 390e-6}),
            product(1, "bfloat16", seconds={"median": 140e-6}, floor_seconds=118e-6, error=1e-3),
            product(1, "codes", seconds={"median": 50e-6}, floor_seconds=31e-6, error=2e-3),
            product(16, "codes", floor_seconds=31e-6, failure="ValueError: error of 1 above 0.01"),
            record("step", "steps", step="decode 1 x 1024", seconds={"median": 6e-3}, floor_seconds=4.8e-3),
            record("step", "steps", step="decode 128 x 1024", left_out="needs more"),
            record(
                "under_load", "steps", num_steps=10, gap_seconds_per_step=1e-4, device_seconds_per_step=8e-3,
                graph_events={"update": 12},
            ),
            record(
                "server", policy="sarathi", tbt_p50_seconds=7e-3, tbt_p99_seconds=13e-3, tbt_p100_seconds=20e-3,
                ttft_p50_seconds=50e-3, ttft_p99_seconds=90e-3, num_stream_tokens=900, num_prompts=30, seconds=30.0,
                num_stalls=0, started_seconds=20.0,
            ),
            record("counters", kernel="decode", dram_share=88.5, registers=90.0, seconds=3e-4),
        ],
        WHEELS, "3.12",
    )  # fmt: skip
    for line in (
        "Measured on NVIDIA H100 80GB HBM3.",
        "- gpu: H100, 580",
        "| copy, GB/s read and written | 3,000 | 4,300 | 2,900 |",
        "- steps: RuntimeError: out of memory",
        "| window | 3.0e-03 | - | failed: ended by signal 6 |",
        "| group 1 | **wrong**: rows left out | - | - |",
        "- top-k: **not equal**",
        "- mistral_window: the tokens of transformers",
        "| decode-64x4k | triton | - | 358 → 397 | 250 → 281 | 400.0 | 75% | 2,687 | 11 | 2.0e-03 |",
        "| decode-64x4k | triton | 4096 | 358 → 397 | 250 → 281 | 500.0 | 60% | 2,150 | 9 | 2.0e-03 |",
        "RuntimeError: out of registers | - | - | - | - |",
        "| decode-64x4k | triton | 264 programs | 390.0 | 400.0 | - |",
        "| MLP | 1 | 30.3 → 46.1 (3.0x) | 21.1 → 33.4 (2.9x) | 140.0 | 50.0 | 2.8x | 62% | 2.0e-03 |",
        "| - | ValueError: error of 1 above 0.01 | - | - | - |",
        "| decode 1 x 1024 | 4.8 → 6.2 | 3.3 → 4.6 | 6.00 | 80% | - | - |",
        "events of graphs: 12 of update",
        "| sarathi | TBT p50 | 6.2 | 4.7 | 7.0 |",
        "| sarathi | TBT max | - | - | 20.0 |",
        "| decode | 300.0 | 88.5 | - | 90 |",
    ):
        assert line in page, line


def test_predictions_of_steps_are_the_first_ones() -> None:
    cases = {case.name: case for case in step_cases()}
    for name, seconds in H100_STEPS.items():
        formula = predictions.step_seconds(predictions.model_step(cases[name]), CEILINGS["H100"])
        assert formula == pytest.approx(seconds, rel=0.05), name


def test_predictions_of_attention_are_the_first_ones() -> None:
    for case, microseconds in (("decode-64x4k", 400), ("decode-8x4k", 60), ("decode-1x32k", 57)):
        seconds = predictions.attention_seconds(case, "triton", None, CEILINGS["H100"])
        assert seconds == pytest.approx(microseconds * 1e-6, rel=0.06), case


def test_stall_free_batching_is_predicted_to_be_that() -> None:
    for ceilings in CEILINGS.values():
        ours, theirs = (predictions.server_seconds(policy, ceilings) for policy in ("sarathi", "prefill_first"))
        assert ours["tbt_p50_seconds"] == theirs["tbt_p50_seconds"]
        assert 3 * ours["tbt_p99_seconds"] < theirs["tbt_p99_seconds"]


def test_wheels_are_what_is_declared_and_not_there(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\ndependencies = ["jax>=0.11,<0.12", "grpcio-reflection>=1.85", "tqdm"]\n'
        '[project.optional-dependencies]\ncuda12 = ["old-kernels"]\ncuda13 = ["jax_triton>=0.4.1"]\n'
    )
    (tmp_path / "constraints.txt").write_text(
        "jax==0.11.2\ngrpcio-reflection==1.85.1\ntqdm==4.70\njax-triton==0.4.1\nold-kernels==1\n"
    )
    frozen = tmp_path / "frozen"
    frozen.write_text("# of an image\njax==0.11.2\ngrpcio_reflection==1.60\njax-cuda13-plugin==0.11.2\n")
    wheels = missing_wheels(tmp_path, read_packages(frozen))
    assert wheels == {"grpcio-reflection": "1.85.1", "jax-triton": "0.4.1", "tqdm": "4.70"}
    said = describe_wheels(wheels, "3.12")
    assert said.startswith("This machine lacks grpcio-reflection 1.85.1, jax-triton 0.4.1, tqdm 4.70.")
    assert "--python-version 3.12" in said
    assert "-d .whl grpcio-reflection==1.85.1 jax-triton==0.4.1 tqdm==4.70\n" in said
    assert "--target site .whl/*.whl" in said
    assert list(missing_wheels(tmp_path, {"jax": "0.11.1", "tqdm": "1", "jax-cuda12-plugin": "1"})) == [
        "grpcio-reflection", "old-kernels",
    ]  # fmt: skip


def test_wheels_of_another_machine() -> None:
    command = [sys.executable, str(SCRIPT), "--wheels", str(ROOT / "docs" / "results" / "gpu-image.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "gguf==0.19.0" in done.stdout
    assert "triton==3" not in done.stdout


def test_what_ncu_counted() -> None:
    said = """==PROF== Connected
"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__inst_executed_pipe_tensor_op_gmma.avg.pct"
"","","%","us","register/thread","%"
"0","prefill","12.5","150.5","184","61.0"
"1","combine","3.0","1,002","96",""
"""
    assert read_counters(said) == [
        {"kernel": "prefill", "dram_share": 12.5, "tensor_share": 61.0, "registers": 184.0, "seconds": 150.5e-6},
        {"kernel": "combine", "dram_share": 3.0, "registers": 96.0, "seconds": pytest.approx(1002e-6)},
    ]
    assert read_counters("==ERROR== no permission") == []
