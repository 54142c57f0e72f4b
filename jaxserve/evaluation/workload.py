"""What is asked of a server: requests with lengths and arrival times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.config import option
from jaxserve.errors import ConfigError
from jaxserve.evaluation.arrivals import gamma_seconds, poisson_seconds, trace_seconds
from jaxserve.evaluation.lengths import PAPER, Trace, zipf_quantile

LENGTHS = (*PAPER, "trace", "uniform", "zipf", "fixed")
ARRIVALS = ("poisson", "gamma", "trace", "closed")


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload; its output length is forced."""

    arrival_seconds: float
    """After the start of the run."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_shared_tokens: int = 0
    """The prompt begins with as many that all requests of its ``group`` begin with."""
    group: int = 0
    client: str = ""
    """Whose it is: see Request."""


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """Which requests come, and when; the same seed gives the same lengths at every rate. Raises ConfigError."""

    lengths: str = option(
        "openchat_sharegpt4",
        "lengths of prompts and outputs: fitted to a data set of the Sarathi-Serve paper, from a trace, uniform or "
        "zipf in total, or fixed",
        LENGTHS,
    )
    trace_file: str | None = option(
        None, "CSV with num_prefill_tokens, num_decode_tokens and, for arrivals of a trace, arrived_at in seconds"
    )
    num_prompt_tokens: int = option(512, "fixed: tokens of a prompt")
    num_output_tokens: int = option(128, "fixed: tokens of an output")
    min_total_tokens: int = option(64, "uniform, zipf: fewest tokens of prompt and output together")
    max_total_tokens: int = option(16384, "most tokens of prompt and output together; longer prompts are cut")
    prompt_output_ratio: float = option(4.0, "uniform, zipf: prompt tokens for each output token")
    zipf_exponent: float = option(0.6, "zipf: 0 is uniform, above it short requests prevail")
    length_scale: float = option(1.0, "factor on all lengths, max_total_tokens included, for small machines")
    shared_prefix_tokens: int = option(
        0, "a prompt's first tokens, or all where it is shorter, are those of its group, as system prompts are"
    )
    shared_prefix_groups: int = option(1, "groups of requests, each with a beginning of its own")
    arrivals: str = option(
        "poisson", "when requests come; closed: a new one when one ends, 'concurrency' in flight", ARRIVALS
    )
    rate: float | None = option(None, "mean requests per second; 1 by default, for a trace its own")
    cv: float = option(2.0, "gamma: coefficient of variation of the gaps; 1 is Poisson")
    concurrency: int = option(8, "closed: requests in flight")
    num_requests: int = option(128, "requests of a run")
    duration_seconds: float | None = option(None, "makes num_requests rate x duration instead")
    workload_seed: int = option(0, "seed of lengths, arrivals and prompts")

    def __post_init__(self) -> None:
        for name, allowed in (("lengths", LENGTHS), ("arrivals", ARRIVALS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in (
            "num_prompt_tokens", "num_output_tokens", "concurrency", "num_requests", "shared_prefix_groups",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 2 <= self.min_total_tokens <= self.max_total_tokens:
            raise ConfigError(
                f"min_total_tokens must be in [2, max_total_tokens {self.max_total_tokens}], "
                f"got {self.min_total_tokens}"
            )
        for name in ("prompt_output_ratio", "length_scale", "cv", "rate", "duration_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name} must be above 0, got {value:g}")
        if not 0 <= self.zipf_exponent < np.inf:
            raise ConfigError(f"zipf_exponent must be at least 0, got {self.zipf_exponent:g}")
        for name in ("workload_seed", "shared_prefix_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if "trace" in (self.lengths, self.arrivals) and not self.trace_file:
            raise ConfigError("trace_file must name a file where lengths or arrivals are 'trace', got none")
        for name in ("rate", "duration_seconds"):
            if self.arrivals == "closed" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} must be left out for closed arrivals, which answers pace, got {getattr(self, name):g}"
                )

    @property
    def mean_rate(self) -> float | None:
        """Requests per second; None for a closed loop and for a trace as it was recorded."""
        return self.rate if self.arrivals in ("closed", "trace") else self.rate or 1.0


def make_workload(config: WorkloadConfig, *, max_model_len: int | None = None) -> list[WorkloadRequest]:
    """The requests in order of arrival; with closed arrivals they all come at 0 and wait for the ones before.

    A request longer than ``max_model_len`` in total loses prompt tokens first. With arrivals of a trace the seed
    chooses the stretch of the trace, whose rows also give the lengths if these are the trace's. Raises ConfigError.
    """
    if max_model_len is not None and max_model_len < 2:
        raise ConfigError(f"max_model_len must be at least 2 for a prompt and an output, got {max_model_len}")
    for_lengths, for_arrivals, for_groups = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence(config.workload_seed).spawn(3)
    )
    trace = _read_trace(config)
    count = config.num_requests
    if config.duration_seconds is not None:
        rate = config.mean_rate
        if rate is None:
            assert trace is not None
            rate = trace.rate
        count = max(1, round(rate * config.duration_seconds))
    if config.arrivals == "trace":
        assert trace is not None
        trace = _stretch(trace, count, for_arrivals, config.trace_file)
        assert trace.arrival_seconds is not None
        times = trace_seconds(trace.arrival_seconds, config.rate)
    elif config.mean_rate is None:
        times = np.zeros(count)
    elif config.arrivals == "gamma":
        times = gamma_seconds(for_arrivals, count, config.mean_rate, config.cv)
    else:
        times = poisson_seconds(for_arrivals, count, config.mean_rate)
    prompts, outputs = _lengths(config, for_lengths.random((count, 2)), trace)
    prompts, outputs = _clip(prompts, outputs, config.max_total_tokens)
    if config.length_scale != 1:
        prompts, outputs = _clip(prompts * config.length_scale, outputs * config.length_scale, None)
    if max_model_len is not None:
        prompts, outputs = _clip(prompts, outputs, max_model_len)
    shared = np.minimum(prompts, config.shared_prefix_tokens)
    groups = for_groups.integers(config.shared_prefix_groups, size=count)
    columns = (column.tolist() for column in (times, prompts, outputs, shared, groups))
    return [WorkloadRequest(*request) for request in zip(*columns, strict=True)]


def _read_trace(config: WorkloadConfig) -> Trace | None:
    """The trace where the workload needs one."""
    path = config.trace_file
    if path is None or "trace" not in (config.lengths, config.arrivals):
        return None
    trace = Trace.read(path)
    if config.arrivals == "trace" and trace.arrival_seconds is None:
        raise ConfigError(f"trace_file must have a column arrived_at for arrivals of a trace, {path!r} has none")
    return trace


def _stretch(trace: Trace, count: int, random: np.random.Generator, path: str | None) -> Trace:
    """``count`` consecutive rows."""
    if count > len(trace):
        raise ConfigError(f"num_requests must not exceed the {len(trace)} of trace_file {path!r}, got {count}")
    start = int(random.integers(len(trace) - count + 1))
    return trace.rows(slice(start, start + count))


def _lengths(config: WorkloadConfig, shares: np.ndarray, trace: Trace | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and outputs from uniform numbers [N, 2], by row: a longer run begins as a shorter one."""
    if config.lengths in PAPER:
        fitted = PAPER[config.lengths]
        return fitted.prompt.quantile(shares[:, 0]), fitted.output.quantile(shares[:, 1])
    if config.lengths == "trace":
        assert trace is not None
        if config.arrivals != "trace":
            trace = trace.rows((shares[:, 0] * len(trace)).astype(int))
        return trace.num_prompt_tokens, trace.num_output_tokens
    if config.lengths == "fixed":
        ones = np.ones(len(shares))
        return ones * config.num_prompt_tokens, ones * config.num_output_tokens
    exponent = config.zipf_exponent if config.lengths == "zipf" else 0.0
    totals = zipf_quantile(shares[:, 0], config.min_total_tokens, config.max_total_tokens, exponent)
    outputs = np.clip(np.round(totals / (1 + config.prompt_output_ratio)), 1, totals - 1)
    return totals - outputs, outputs


def _clip(prompts: np.ndarray, outputs: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Whole tokens, at least one each and at most ``limit`` together; prompts give way first."""
    prompts, outputs = (np.maximum(np.round(tokens), 1).astype(int) for tokens in (prompts, outputs))
    if limit is not None:
        prompts = np.clip(prompts, 1, np.maximum(limit - outputs, 1))
        outputs = np.minimum(outputs, limit - prompts)
    return prompts, outputs
