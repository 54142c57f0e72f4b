"""The charts of a report, drawn by matplotlib as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from jaxserve.evaluation.latency import PERCENTS, Objective, Percentiles

if TYPE_CHECKING:
    from jaxserve.evaluation.compare import Outcome
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
TIMELINE_BINS = 400
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
                ax.plot(rates, medians, label=series.name, markersize=4, **style)
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


def comparison(path: str, outcomes: Sequence[Outcome]) -> None:
    """Throughput of every contestant, a dot for each round, and distributions of TTFT and TBT; an image file."""
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH_INCHES, 3.6), layout="constrained")
        bars, *axes = figure.subplots(1, 3)
        for index, outcome in enumerate(outcomes):
            color, speeds = COLORS[index % len(COLORS)], outcome.tokens_per_second
            if speeds:
                bars.barh(outcome.name, np.median(speeds), color=color, alpha=0.6)
                bars.scatter(speeds, [outcome.name] * len(speeds), s=10, color=color, zorder=3)
            for ax, seconds in zip(axes, (outcome.latency.ttft_seconds, outcome.latency.tbt_seconds), strict=True):
                if len(seconds):
                    _cdf(ax, Percentiles.of(seconds), outcome.name, index)
        bars.invert_yaxis()
        bars.set_xlabel("output tokens/s, offline")
        for ax, label in zip(axes, ("TTFT", "TBT"), strict=True):
            _log_seconds(ax, "x")
            ax.set_xlabel(f"{label} (s), online")
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.savefig(path, dpi=150)


def timeline(series: Series) -> Chart:
    """What the device computed over time: tokens and padding of the steps, and how long these took."""
    steps = series.run.steps
    origin = steps[0].device_start_seconds
    starts = np.array([step.device_start_seconds - origin for step in steps])
    ends = np.array([step.ready_seconds - origin for step in steps])
    exact = len(steps) <= TIMELINE_BINS
    edges = np.unique([starts, ends]) if exact else np.linspace(0, ends[-1], TIMELINE_BINS + 1)

    def mean(values: Sequence[float]) -> np.ndarray:
        """Time averages in the bins of what holds from a step's start to its end; between steps it is 0."""
        done = np.cumsum(np.array(values) * (ends - starts))
        times, integral = np.stack([starts, ends], 1), np.stack([np.r_[0, done[:-1]], done], 1)
        return np.diff(np.interp(edges, times.ravel(), integral.ravel())) / np.diff(edges)

    longest = np.zeros(len(edges) - 1)
    first, last = np.searchsorted(edges, starts, "right") - 1, np.searchsorted(edges, ends, "left")
    for begin, end, seconds in zip(first, last, ends - starts, strict=True):
        longest[begin:end] = np.maximum(longest[begin:end], seconds)
    layers = (
        ("decode", COLORS[0], [step.num_decode_tokens for step in steps]),
        ("prefill", COLORS[4], [step.num_tokens - step.num_decode_tokens for step in steps]),
        ("padding", "#d0d0d0", [step.num_rows - step.num_tokens for step in steps]),
    )
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH_INCHES, 4.4), layout="constrained")
        held, took = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        bottom = np.zeros(len(longest))
        for label, color, values in layers:
            top = bottom + mean(values)
            held.stairs(top, edges, baseline=bottom, fill=True, color=color, label=label, linewidth=0)
            bottom = top
        held.set_ylabel("rows of the step (tokens)")
        held.set_ylim(0, max(1.0, 1.05 * bottom.max()))
        took.stairs(1000 * longest, edges, color="#333333", linewidth=1.0)
        took.set_ylabel("step (ms)")
        took.set_ylim(0, 1100 * longest.max())
        took.set_xlabel("time (s)")
        took.set_xlim(0, edges[-1])
        _legend(figure, held)
        svg = _svg(figure, f"timeline-{series.name}")
    at = "" if series.rate is None else f" at {series.rate:.3g} requests/s"
    caption = f"What the {len(steps)} steps hold, and below how long they take"
    if not exact:
        caption += (
            f", in intervals of {edges[1] - edges[0]:.2g} s: the average, in which an idle device counts as 0, "
            "and the longest step"
        )
    return Chart(f"Steps of {series.name}{at}", f"{caption}.", svg)


def _cdf(ax: Axes, percentiles: Percentiles, label: str, index: int) -> None:
    ax.plot(percentiles.seconds, np.array(PERCENTS) / 100, label=label, color=COLORS[index % len(COLORS)])


def _limit(line: object, value: float) -> None:
    assert callable(line)
    line(value, color=OBJECTIVE_COLOR, linestyle="--", linewidth=1, label="objective")


def _log_seconds(ax: Axes, name: str) -> None:
    """Log scale with plain numbers: of each decade 1, 2 and 5 on a short axis, 1 on a long one."""
    if not np.isfinite(getattr(ax.dataLim, f"minpos{name}")):
        return  # nothing above 0
    getattr(ax, f"set_{name}scale")("log", nonpositive="clip")
    low, high = getattr(ax, f"get_{name}lim")()
    axis = getattr(ax, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axis.set_minor_formatter(NullFormatter())


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
