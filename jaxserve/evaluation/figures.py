"""The charts of a report, drawn by matplotlib as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from jaxserve.evaluation.latency import PERCENTS, Objective, Percentiles

if TYPE_CHECKING:
    from jaxserve.evaluation.report import Series

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart."""
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
}  # fmt: skip
WIDTH_INCHES = 10.5
OBJECTIVE_COLOR = "#777777"
TIMELINE_BINS = 200
"""A longer run is averaged over as many intervals."""


class Chart(NamedTuple):
    title: str
    caption: str
    svg: str


def distributions(all_series: Sequence[Series], objective: Objective | None) -> Chart:
    """Cumulative distributions of TTFT, TBT and scheduling delay."""
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH_INCHES, 3.6), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        panels = (
            ("TTFT", "ttft", "ttft_seconds"),
            ("TBT", "tbt", "p99_tbt_seconds"),
            ("Scheduling delay", "delay", None),
        )
        for ax, (label, name, limit) in zip(axes, panels, strict=True):
            for index, series in enumerate(all_series):
                _cdf(ax, getattr(series.run.summary(), name), series.name, index)
            if objective is not None and limit is not None and np.isfinite(getattr(objective, limit)):
                _limit(ax.axvline, getattr(objective, limit))
            _log_seconds(ax, "x")
            ax.set_xlabel(f"{label} (s)")
        axes[0].set_ylabel("share at or below")
        axes[0].set_ylim(0, 1.02)
        axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(figure, axes[1])
        svg = _svg(figure, "distributions")
    rates = sorted({series.rate for series in all_series if series.rate is not None})
    at = f" at {rates[0]:.3g} requests/s" if len(rates) == 1 else ""
    return Chart(f"Latency{at}", "TTFT and scheduling delay of requests, TBT of all tokens but the first.", svg)


def rate_curves(all_series: Sequence[Series], objective: Objective | None) -> Chart:
    """P99 TBT, median TTFT and median delay over the rate: the median of the trials, one line for each series."""
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH_INCHES, 3.6), layout="constrained")
        axes = figure.subplots(1, 3)
        panels = (
            ("P99 TBT", "tbt", 99, "p99_tbt_seconds"),
            ("median TTFT", "ttft", 50, None),
            ("median scheduling delay", "delay", 50, "median_delay_seconds"),
        )
        for ax, (label, name, percent, limit) in zip(axes, panels, strict=True):
            for index, series in enumerate(all_series):
                if series.capacity is None:
                    continue
                style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
                trials = [(t.rate, getattr(t.summary, name).at(percent)) for t in series.capacity.trials]
                rates = series.capacity.rates
                medians = [np.median([seconds for other, seconds in trials if other == rate]) for rate in rates]
                ax.plot(rates, medians, label=series.name, markersize=5, **style)
                ax.scatter(*zip(*trials, strict=True), s=10, alpha=0.35, linewidths=0, **style)
            if objective is not None and limit is not None:
                _limit(ax.axhline, getattr(objective, limit))
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
            _log_seconds(ax, "y")
            ax.set_xlabel("rate (requests/s)")
            ax.set_ylabel(f"{label} (s)")
        _legend(figure, axes[0])
        svg = _svg(figure, "rate-curves")
    return Chart("Latency over the rate", "Lines are medians of the trials at a rate, faint marks the trials.", svg)


def timeline(series: Series) -> Chart:
    """What the steps of a run computed over time: tokens and padding of a step, and how long it took."""
    steps = series.run.steps
    start = steps[0].start_seconds
    ends = np.array([step.ready_seconds - start for step in steps])
    decodes = np.array([step.num_decode_tokens for step in steps], float)
    tokens = np.array([step.num_tokens for step in steps], float)
    rows = np.array([step.num_rows for step in steps], float)
    seconds = np.array([step.ready_seconds - step.device_start_seconds for step in steps])
    num_bins = min(TIMELINE_BINS, len(steps))
    edges = np.linspace(0, ends[-1], num_bins + 1)
    bins = np.clip(np.searchsorted(edges, ends, side="left") - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(bins, values, num_bins) / np.maximum(counts, 1)

    longest = np.zeros(num_bins)
    np.maximum.at(longest, bins, seconds)
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH_INCHES, 4.4), layout="constrained")
        held, took = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        layers = (mean(decodes), mean(tokens - decodes), mean(rows - tokens))
        colors = (COLORS[0], COLORS[4], "#d0d0d0")
        bottom = np.zeros(num_bins)
        for label, layer, color in zip(("decode", "prefill", "padding"), layers, colors, strict=True):
            held.stairs(bottom + layer, edges, baseline=bottom, fill=True, color=color, label=label, linewidth=0)
            bottom = bottom + layer
        held.set_ylabel("rows in a step (tokens)")
        held.set_ylim(0, max(1.0, 1.05 * bottom.max()))
        took.stairs(1000 * longest, edges, color="#333333", linewidth=1.0)
        took.set_ylabel("step (ms)")
        took.set_ylim(0)
        took.set_xlabel("time (s)")
        took.set_xlim(0, ends[-1])
        _legend(figure, held)
        svg = _svg(figure, f"timeline-{series.name}")
    bin_ms = 1000 * ends[-1] / num_bins
    at = "" if series.rate is None else f" at {series.rate:.3g} requests/s"
    caption = f"Means over the {len(steps)} steps in intervals of {bin_ms:.3g} ms; below, the longest step of each."
    return Chart(f"Steps of {series.name}{at}", caption, svg)


def _cdf(ax: Axes, percentiles: Percentiles, label: str, index: int) -> None:
    ax.plot(percentiles.seconds, np.array(PERCENTS) / 100, label=label, color=COLORS[index % len(COLORS)])


def _limit(line: object, value: float) -> None:
    assert callable(line)
    line(value, color=OBJECTIVE_COLOR, linestyle="--", linewidth=1, label="objective")


def _log_seconds(ax: Axes, axis: str) -> None:
    """Log scale with plain numbers, where there is something to show on it."""
    getattr(ax, f"set_{axis}scale")("log", nonpositive="clip")
    getattr(ax, f"{axis}axis").set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))


def _legend(figure: Figure, ax: Axes) -> None:
    """Above the axes, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def _svg(figure: Figure, name: str) -> str:
    """The ``<svg>`` element alone, with ids that no other figure of the page has."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
