"""Who else is on the GPU, before jax takes its memory: later jax only says that an allocation has failed."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec

import jax

from jaxserve.errors import ConfigError

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
TIMEOUT_SECONDS = 10.0
MIB_PER_GIB = 1024


def check_gpu_is_free(gpu_memory_utilization: float) -> None:
    """Raise ConfigError if others have so much of the first GPU that this share of its memory is not free, as vLLM
    does. Nothing happens where jax would use no GPU, or nvidia-smi does not tell."""
    platforms = set(filter(None, (jax.config.jax_platforms or "").split(",")))
    if (platforms and not platforms & {"cuda", "gpu"}) or not any(map(find_spec, PLUGINS)):
        return
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    memory = _ask(gpu, "--query-gpu=memory.total,memory.free")
    try:
        total, free = (int(field) / MIB_PER_GIB for field in memory.split(","))
    except ValueError:  # no nvidia-smi, or a part of a GPU (MIG)
        return
    wanted = gpu_memory_utilization * total
    if free >= wanted:
        return
    users = _ask(gpu, "--query-compute-apps=pid,process_name,used_memory").splitlines()
    shown = "; ".join(_shown(user) for user in users) or "processes that nvidia-smi does not show here"
    raise ConfigError(
        f"gpu_memory_utilization {gpu_memory_utilization:g} needs {wanted:.1f} GiB of GPU {gpu}, which has {free:.1f} "
        f"of {total:.1f} GiB free. The rest is taken by {shown}. End them, as by shutting down another notebook's "
        f"kernel, or lower gpu_memory_utilization"
    )


def _ask(gpu: str, query: str) -> str:
    """Lines of CSV; nothing where there is no answer."""
    command = ["nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _shown(user: str) -> str:
    pid, name, used_mib = (field.strip() for field in user.split(","))
    used = f"{int(used_mib) / MIB_PER_GIB:.1f} GiB" if used_mib.isdigit() else "unknown memory"
    return f"process {pid} ({name}), {used}"
