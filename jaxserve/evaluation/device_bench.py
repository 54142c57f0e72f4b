"""What benchmarks of one device share: its ceilings, timing without the host, rooflines, and results as files."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.evaluation.report import machine

COPY_BYTES = {"gpu": 2**31, "cpu": 2**26}
PRODUCTS = {"gpu": (8192, "bfloat16"), "cpu": (1024, "float32")}
"""Sizes, and types, at which a device shows its ceilings, by platform."""


class Ceilings(NamedTuple):
    """The most that a device achieves, measured in the same run as what is compared with it."""

    copy_bytes_per_second: float
    """Read and written, by a large copy within the device."""
    matmul_flops_per_second: float
    """Of a large square product."""


class Work(NamedTuple):
    """The least that any program must do."""

    flops: float
    num_bytes: float
    """To and from the device's memory."""

    def memory_seconds(self, ceilings: Ceilings) -> float:
        return self.num_bytes / ceilings.copy_bytes_per_second

    def compute_seconds(self, ceilings: Ceilings) -> float:
        return self.flops / ceilings.matmul_flops_per_second

    def floor_seconds(self, ceilings: Ceilings) -> float:
        """The longer of computing and of moving the bytes (the roofline: Williams et al., 2009)."""
        return max(self.memory_seconds(ceilings), self.compute_seconds(ceilings))


class Timing(NamedTuple):
    """Seconds, over several measurements of the same thing."""

    median: float
    shortest: float
    longest: float

    def per(self, count: int) -> Timing:
        return Timing(*(seconds / count for seconds in self))

    @property
    def spread(self) -> float:
        """Differences smaller than this share are noise."""
        return (self.longest - self.shortest) / self.median


class Effort(NamedTuple):
    """How long something is measured."""

    repeats: int = 20
    least_seconds: float = 0.05
    """Of one measurement, which a wait of the host for the device, some 50 microseconds, then does not distort."""
    most_seconds: float = 2.0
    """Of all repeats; slow things are repeated less often, but three times."""


WARM_UPS = 3
"""A GPU runs a program operation by operation first, captures its CUDA graph in the second run and replays it from then
on."""

THOROUGH = Effort()
QUICK = Effort(5, 0.02, 0.5)


def time_launches(launch: Callable[[], Any], effort: Effort = THOROUGH) -> Timing:
    """Seconds of one ``launch()`` among many that follow each other without a wait.

    ``launch`` starts a program and returns what it makes. The device works off its queue while the host fills it, so
    the host's time vanishes if it is shorter than the device's.
    """
    for _ in range(WARM_UPS):
        jax.block_until_ready(launch())
    once = _seconds(launch, 1)
    count = max(1, math.ceil(effort.least_seconds / once))
    repeats = min(effort.repeats, max(3, int(effort.most_seconds / (once * count))))
    seconds = [_seconds(launch, count) / count for _ in range(repeats)]
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def _seconds(launch: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        made = launch()
    jax.block_until_ready(made)
    return time.perf_counter() - start


def measure_ceilings(effort: Effort = THOROUGH) -> Ceilings:
    """On random data: zeros run faster."""
    num_bytes, (size, dtype) = COPY_BYTES[jax.default_backend()], PRODUCTS[jax.default_backend()]
    data = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    copy = jax.jit(jnp.copy)
    copy_seconds = time_launches(lambda: copy(data), effort).median
    data.delete()
    left, right = jax.random.normal(jax.random.key(1), (2, size, size), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul_seconds = time_launches(lambda: matmul(left, right), effort).median
    return Ceilings(2 * num_bytes / copy_seconds, 2 * size**3 / matmul_seconds)


def device_slug() -> str:
    """The device's kind as a part of file names: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The first column to the left, the others to the right."""
    columns = list(rows[0])
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_results(
    folder: Path,
    name: str,
    *,
    title: str,
    method: str,
    ceilings: Ceilings,
    tables: Mapping[str, Sequence[Mapping[str, str]]],
    notes: Sequence[str],
    raw: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Write ``<name>-<device>.json`` with ``raw`` and the same ``.md`` with ``tables``, by their headings; the paths.

    ``raw`` holds no NaN and no infinity, which JSON lacks.
    """
    facts = machine()
    stem = folder / f"{name}-{device_slug()}"
    json_path, markdown_path = stem.with_suffix(".json"), stem.with_suffix(".md")
    everything = {"title": title, "machine": facts, "method": method, "ceilings": ceilings._asdict(), **raw}
    json_path.write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    parts = [
        f"# {title}",
        "\n".join(f"- {fact}: {value}" for fact, value in facts.items()),
        f"Ceilings, measured in the same run: a copy moves {ceilings.copy_bytes_per_second / 1e9:,.0f} GB/s, bytes "
        f"read and written; a matrix product makes {ceilings.matmul_flops_per_second / 1e12:,.2f} TFLOP/s.",
        method,
        *(f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables.items() if rows),
        "\n".join(f"- {note}" for note in notes),
    ]
    markdown_path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return json_path, markdown_path
