"""What was tuned, as one file: the next start on such a machine need not tune."""

from __future__ import annotations

import tarfile

from jaxserve.config import cache_dir
from jaxserve.evaluation.gpu_check.stage import Context

TUNED = "xla_gpu_per_fusion_autotune_cache_dir"
"""jax's, within its cache of compiled programs."""


def run(context: Context) -> None:
    folder = cache_dir() / "compiled" / TUNED
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    if files:
        with tarfile.open(context.out / "autotune.tar.gz", "w:gz") as archive:
            archive.add(folder, TUNED)
    context.records.add("archive", num_files=len(files))
