"""What Nsight Compute's hardware counters say of the attention kernels, where it is installed."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys

import jax

from jaxserve.evaluation.attention_batch import attention_chain, random_batch
from jaxserve.evaluation.gpu_check.stage import Context, StageFailed
from jaxserve.evaluation.kernel_bench import CASES, SHAPE, WINDOW
from jaxserve.kernels.backend import Target
from jaxserve.kernels.registry import choose_backend

KERNELS = "attend|combine"
"""Prefill and decode are one function, compiled twice."""
NUM_LAUNCHES = 6
"""Of these, by two layers."""
CASE = "hybrid"
COLUMNS = {
    "dram_share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_share": "pipe_tensor",
    "registers": "launch__registers_per_thread",
    "seconds": "gpu__time_duration.sum",
}
"""By name, what is in the name of ncu's metric: that of the tensor pipe differs between devices."""


def run(context: Context) -> None:
    """With the argument ``launch`` it is what ncu watches."""
    if context.arguments == ["launch"]:
        _launch()
        return
    if context.tiny or shutil.which("ncu") is None:
        context.records.add("counters", failure="no ncu here")
        return
    command = [
        "ncu", "--set", "basic", "--section", "ComputeWorkloadAnalysis", "--kernel-name", f"regex:{KERNELS}",
        "--launch-count", str(NUM_LAUNCHES), "--clock-control", "none",  # the card's settings are not ours
        "--page", "raw", "--csv", sys.executable, "-m", "jaxserve.evaluation.gpu_check.worker", context.name,
        "counters", "launch", "--out", str(context.out), "--seconds", str(context.left_seconds),
    ]  # fmt: skip
    # Single launches: within a graph ncu would see them, but run the graph again for each.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "XLA_FLAGS": flags}).stdout
    found = read_counters(said)
    for kernel in found:
        context.records.add("counters", **kernel)
    if not found:
        raise StageFailed(f"ncu counted nothing: {said[-500:]}")


def _launch() -> None:
    backend = choose_backend("triton", Target.of(jax.devices()[0]), SHAPE)
    batch = random_batch(CASES[CASE].sequences, SHAPE, backend, window=WINDOW)
    jax.block_until_ready(attention_chain(batch, 2, graphs=False)())


def read_counters(said: str) -> list[dict[str, str | float]]:
    """Of each kernel what COLUMNS names, from ncu's page of raw values, whose second row has the units."""
    lines = said.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    kernels = []
    for row in rows[1:]:
        values: dict[str, str | float] = {"kernel": row["Kernel Name"]}
        for name, part in COLUMNS.items():
            metric = next((metric for metric in row if metric and part in metric and row[metric]), None)
            if metric is not None:
                unit = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3}.get(rows[0][metric], 1.0)
                values[name] = float(row[metric].replace(",", "")) * unit
        kernels.append(values)
    return kernels
