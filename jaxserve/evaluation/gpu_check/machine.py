"""What the machine is: versions, tools, memory, and its ceilings."""

from __future__ import annotations

import shutil
import subprocess

import jax

from jaxserve.evaluation.compiled import triton_assembler
from jaxserve.evaluation.device_bench import QUICK, Effort, measure_ceilings
from jaxserve.evaluation.gpu_check.stage import Context
from jaxserve.evaluation.report import machine

TINY_EFFORT = Effort(1, 0.0, 0.1)
GPU_FACTS = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,pstate"


def run(context: Context) -> None:
    device, assembler = jax.devices()[0], triton_assembler()
    context.records.add(
        "machine",
        facts=machine(),
        devices=len(jax.devices()),
        bytes_limit=(device.memory_stats() or {}).get("bytes_limit"),
        gpu=_said("nvidia-smi", f"--query-gpu={GPU_FACTS}", "--format=csv,noheader"),
        ptxas=assembler and _said(str(assembler), "--version"),
        ncu=_said("ncu", "--version"),
    )
    ceilings = measure_ceilings(TINY_EFFORT if context.tiny else QUICK)
    context.records.add("ceilings", **ceilings._asdict())


def _said(tool: str, *arguments: str) -> str | None:
    """The last line of what a tool says of itself; None without the tool."""
    if shutil.which(tool) is None:
        return None
    said = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=10).stdout.strip()
    return said.splitlines()[-1] if said else None
