"""The Triton kernels compiled for a Hopper GPU, on any machine, by the installed Triton and by that of GPU images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.kernels.triton_attention import DECODE_PROGRAMS_PER_CORE, PREFILL_PROGRAMS_PER_CORE
from tests import gpu_packages

ROOT = Path(__file__).parents[2]
SHARED_MEMORY_BYTES = 227 * 1024
"""Of one program on Hopper."""
MISTRAL = ("window", "window, 2 prefill programs", "window, pod")
"""What Triton 3.6 compiles."""
TWO_ON_A_CORE = {("window, 2 prefill programs", "prefill"), ("window, pod", "attend_both")}
SPILLED_BYTES = {
    **dict.fromkeys(TWO_ON_A_CORE, 128),
    ("float8 KV", "prefill"): 8,
    ("16/8 x 256, float8 KV, pages of 16", "prefill"): 44,
    ("16/8 x 256, float8 KV, pages of 16", "decode"): 8,
}
"""The most that a thread stores and loads, beside loops of hundreds of instructions."""
Kernels = dict[str, dict[str, dict[str, Any]]]
"""By variant, then by name."""


def report(module: str, *arguments: str, triton_36: bool = False) -> subprocess.Popen[str]:
    """Another process: this one has Triton's interpreter."""
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    environment = gpu_packages.environment(triton_36=triton_36)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def reports() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All at once."""
    started = {
        "installed": report("ptxas_report", "--json"),
        "3.6": report("ptxas_report", "--json", "--variants", *MISTRAL, triton_36=True),
        "overlap": report("overlap_report"),
        "groups": report("groups_report"),
    }
    yield started
    for process in started.values():
        process.kill()


def output(process: subprocess.Popen[str]) -> Any:
    text, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(text)


@pytest.fixture(scope="module", params=["installed", "3.6"])
def kernels(request: pytest.FixtureRequest, reports: dict[str, subprocess.Popen[str]]) -> Kernels:
    found = output(reports[request.param])
    return {variant: {kernel["kernel"]: kernel for kernel in compiled} for variant, compiled in found.items()}


def test_registers_and_shared_memory_suffice(kernels: Kernels) -> None:
    for variant, compiled in kernels.items():
        pod = ["attend_both"] if variant == "window, pod" else []
        assert [*compiled] == ["rotate_and_write", "prefill", "decode", *pod, "combine"]
        for name, kernel in compiled.items():
            most = SPILLED_BYTES.get((variant, name), 0)
            assert kernel["spilled_bytes"] <= most, (variant, kernel)
            assert kernel["shared_bytes"] <= SHARED_MEMORY_BYTES, (variant, kernel)
            assert kernel["local_accesses"] <= most / 4, (variant, kernel)


def test_chunks_use_warpgroups_matrix_instructions(kernels: Kernels) -> None:
    """Twelve in a loop: keys in steps of 16 head dimensions, values in steps of 16 keys."""
    for variant, compiled in kernels.items():
        assert compiled["prefill"]["wgmma"] > 0, variant
        assert compiled["prefill"]["mma"] == 0, variant
    assert kernels["window"]["prefill"]["wgmma"] == 2 * 12
    assert kernels["window, pod"]["attend_both"]["wgmma"] == 2 * 12


def test_as_many_programs_run_at_once_as_work_lists_are_cut_for(kernels: Kernels) -> None:
    assert kernels["window"]["decode"]["occupancy"] == DECODE_PROGRAMS_PER_CORE
    assert kernels["window"]["prefill"]["occupancy"] == PREFILL_PROGRAMS_PER_CORE
    for variant, name in TWO_ON_A_CORE:
        assert kernels[variant][name]["occupancy"] == 2, variant


def test_a_decode_fits_beside_a_chunk(kernels: Kernels) -> None:
    """On one multiprocessor, so that the two launches can run at once."""
    prefill, decode = kernels["window"]["prefill"], kernels["window"]["decode"]
    assert prefill["core_registers"] + decode["core_registers"] <= 65536
    assert prefill["shared_bytes"] + decode["shared_bytes"] + 2 * 1024 <= 228 * 1024


def test_few_instructions_for_each_tile_of_keys(kernels: Kernels) -> None:
    """Of a warp. Only tiles at an edge of what is seen are masked."""
    unmasked, masked = kernels["window"]["prefill"]["loops"]
    assert unmasked <= 430
    assert masked <= 600
    (decode,) = kernels["window"]["decode"]["loops"]
    assert decode <= 430


def test_decodes_do_not_wait_for_chunks(reports: dict[str, subprocess.Popen[str]]) -> None:
    """Nor chunks for decodes."""
    assert output(reports["overlap"]) == {
        "rotate_and_write": [],
        "prefill": ["rotate_and_write"],
        "decode": ["rotate_and_write"],
        "combine": ["rotate_and_write", "prefill", "decode"],
    }


def test_products_of_experts(reports: dict[str, subprocess.Popen[str]]) -> None:
    """Of chunks by warpgroups' instructions; at least two programs on a multiprocessor; nothing spilled but a few bytes
    outside of loops."""
    for case, compiled in output(reports["groups"]).items():
        for kernel in compiled:
            assert kernel["spilled_bytes"] <= 32, (case, kernel)
            assert kernel["spilled_bytes"] == 0 or not case.startswith("chunks"), (case, kernel)
            assert kernel["occupancy"] >= 2, (case, kernel)
            assert (kernel["wgmma"] > 0) == case.startswith("chunks"), (case, kernel)
