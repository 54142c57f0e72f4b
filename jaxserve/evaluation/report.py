"""One HTML page about a benchmark, self-contained, and its numbers as JSON beside it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from jaxserve.errors import ConfigError
from jaxserve.evaluation.capacity import CapacityResult
from jaxserve.evaluation.drafts import drafts_row
from jaxserve.evaluation.latency import Objective, RunResult
from jaxserve.kernels import native

PACKAGES = (
    "jaxserve",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-triton",
    "triton",
    "flax",
    "numpy",
    "grpcio",
)
COLUMNS = (
    "policy", "rate /s", "requests", "failed", "TTFT p50 s", "TTFT p99 s", "TBT p50 ms", "TBT p99 ms", "TBT max ms",
    "delay p50 s", "delay p99 s", "stalls", "preempted", "output tokens/s", "requests/s", "goodput /s",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One policy or server in a report."""

    name: str
    run: RunResult
    """The run shown in detail."""
    rate: float | None
    """Its requests per second; None for a closed loop."""
    capacity: CapacityResult | None = None


def check_can_report(path: str) -> None:
    """Raise ConfigError before a long benchmark whose report could not be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("report needs matplotlib, which the extra 'bench' of jaxserve brings, got no such package")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"report must be in a folder that exists, got {path!r}")


def summary_row(series: Series, objective: Objective | None) -> dict[str, str]:
    """The run shown in detail, under ``COLUMNS``."""
    summary = series.run.summary(objective)
    goodput = summary.goodput_requests_per_second
    values = (
        series.name,
        "-" if series.rate is None else f"{series.rate:.3g}",
        f"{summary.num_requests}",
        f"{summary.num_failed}",
        *(f"{summary.ttft.at(percent):.2f}" for percent in (50, 99)),
        *(f"{1000 * summary.tbt.at(percent):.1f}" for percent in (50, 99, 100)),
        *(f"{summary.delay.at(percent):.2f}" for percent in (50, 99)),
        f"{summary.num_stalls}",
        f"{summary.num_preemptions}",
        f"{summary.output_tokens_per_second:.1f}",
        f"{summary.requests_per_second:.2f}",
        "-" if goodput is None else f"{goodput:.2f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def draft_rows(all_series: Sequence[Series]) -> list[dict[str, str]]:
    """Of the runs shown in detail, those that had drafts."""
    counted = [(series, series.run.drafts) for series in all_series if series.run.drafts is not None]
    return [
        {"policy": series.name} | drafts_row(drafts, series.run.num_output_tokens - len(series.run.requests))
        for series, drafts in counted
        if drafts.num_rows
    ]


def capacity_row(series: Series, best: float) -> dict[str, str]:
    """What the search found, beside the highest capacity of all series."""
    capacity = series.capacity
    assert capacity is not None
    return {
        "policy": series.name,
        "capacity /s": f"{capacity.rate:.3g}",
        "of the best": f"{capacity.rate / best:.2f}" if best else "-",
        "converged": "yes" if capacity.converged else "no",
        "trials": str(len(capacity.trials)),
        "why": capacity.reason,
    }


def capacity_rows(all_series: Sequence[Series]) -> list[dict[str, str]]:
    """None where nothing was searched."""
    searched = [series for series in all_series if series.capacity is not None]
    best = max((series.capacity.rate for series in searched if series.capacity), default=0.0)
    return [capacity_row(series, best) for series in searched]


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """For a terminal: names to the left, numbers to the right."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    lines = [dict(zip(columns, columns, strict=True)), *rows]
    ends = (columns[0], "why")
    return "\n".join(
        "  ".join(
            line[column].ljust(width) if column in ends else line[column].rjust(width)
            for column, width in zip(columns, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def processor() -> str:
    """The CPU, how many of its cores this process may use, and what native kernels are compiled for on it. Raises
    ConfigError, see ``native.instruction_set``."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(names, "").strip()
    # Cores that this process may use, which a container may have fewer of than the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = native.instruction_set()
    kernels = "no native kernels" if instructions is None else f"native kernels for {instructions.name}"
    return f"{model or platform.processor() or platform.machine()}, {cores} cores, {kernels}"


def machine() -> dict[str, str]:
    """Where this process runs, and on which versions."""
    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processor(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
    }
    if "jax" in sys.modules:
        facts["devices"] = ", ".join(device.device_kind for device in sys.modules["jax"].devices())
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def write_report(
    path: str,
    title: str,
    all_series: Sequence[Series],
    objective: Objective | None,
    settings: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write the page to ``path``, and everything measured to the same name with .json, which is returned.

    ``settings`` are the configurations by name.
    """
    from jaxserve.evaluation import figures  # matplotlib is an extra

    charts = [figures.distributions(all_series, objective)]
    if any(series.capacity for series in all_series):
        charts.append(figures.rate_curves(all_series, objective))
    charts += [figures.timeline(series) for series in all_series if series.run.steps]
    about = machine()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        objective=objective,
        capacities=capacity_rows(all_series),
        runs=[summary_row(series, objective) for series in all_series],
        drafts=draft_rows(all_series),
        charts=charts,
        errors=[f"{series.name}: {error}" for series in all_series for error in series.run.errors],
        machine=about,
        infinity=math.inf,
        settings=settings,
    )
    Path(path).write_text(page, encoding="utf-8")
    raw = {
        "title": title,
        "machine": about,
        "settings": settings,
        "objective": None if objective is None else asdict(objective),
        "series": [
            {
                "name": series.name,
                "rate": series.rate,
                "run": series.run.to_json(objective),
                "capacity": None if series.capacity is None else series.capacity.to_json(),
            }
            for series in all_series
        ],
    }
    json_path = Path(path).with_suffix(".json")
    json_path.write_text(json.dumps(_strict(raw), allow_nan=False), encoding="utf-8")
    return json_path


def _strict(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _strict(item) for key, item in value.items()}
        case list() | tuple():
            return [_strict(item) for item in value]
    return value
