"""How long requests are: quantile functions from a share in [0, 1) to tokens, and traces."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy import stats

from jaxserve.errors import ConfigError

LOG_QUANTILES = {"log-normal": stats.norm.ppf, "weibull": stats.gumbel_l.ppf, "log-logistic": stats.logistic.ppf}
"""Quantile functions of the logarithm, in standard form; each family has a free location and scale there."""


@dataclass(frozen=True)
class FittedLength:
    """Tokens of a prompt or an output whose median and P90 are known; hits both exactly, before rounding."""

    family: str
    median_tokens: float
    p90_tokens: float

    def quantile(self, share: np.ndarray) -> np.ndarray:
        """Location and scale in the logarithm follow from the two quantiles: q(0.5) is the median, q(0.9) the P90."""
        standard = LOG_QUANTILES[self.family]
        median, p90 = standard(0.5), standard(0.9)
        exponent = (standard(share) - median) / (p90 - median)
        return self.median_tokens * (self.p90_tokens / self.median_tokens) ** exponent


@dataclass(frozen=True)
class PromptAndOutput:
    """Two lengths of one request, independent of each other."""

    prompt: FittedLength
    output: FittedLength


PAPER = {
    "openchat_sharegpt4": PromptAndOutput(FittedLength("weibull", 1730, 5696), FittedLength("weibull", 415, 834)),
    "arxiv_summarization": PromptAndOutput(
        FittedLength("log-normal", 7059, 12985), FittedLength("log-logistic", 208, 371)
    ),
}
"""Medians and P90s of arXiv 2403.02310, table 2; of the families the ones that come closest to its standard deviations.

Those are 2088 and 101, 3638 and 265 tokens; what comes out, clipped to 16384 in total, is 2440 and 275, 3470 and 132.
101 contradicts its own median and P90: half of the lengths at most 415 and a tenth at least 834 make at least 121.
"""


def zipf_quantile(share: np.ndarray, low: int, high: int, exponent: float) -> np.ndarray:
    """Integers in [low, high], the k-th of them with a probability proportional to k ** -exponent."""
    cumulative = np.cumsum(np.arange(1, high - low + 2, dtype=float) ** -exponent)
    return low + np.searchsorted(cumulative / cumulative[-1], share, side="right")


@dataclass(frozen=True)
class Trace:
    """Requests of a service as recorded, in order."""

    num_prompt_tokens: np.ndarray
    num_output_tokens: np.ndarray
    arrival_seconds: np.ndarray | None = None
    """None where the trace holds lengths only."""

    @classmethod
    def read(cls, path: str) -> Self:
        """A CSV file with the columns num_prefill_tokens, num_decode_tokens and, maybe, arrived_at in seconds.

        Raises ConfigError.
        """
        try:
            with Path(path).open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                rows, names = list(reader), reader.fieldnames or ()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"trace_file: cannot read {path!r}: {error}") from error
        for name in ("num_prefill_tokens", "num_decode_tokens"):
            if name not in names:
                has = ", ".join(names) or "none"
                raise ConfigError(f"trace_file must have a column {name}, {path!r} has {has}")
        if not rows:
            raise ConfigError(f"trace_file must hold at least one request, {path!r} has none")
        prompts, outputs = (_column(rows, name, path) for name in ("num_prefill_tokens", "num_decode_tokens"))
        if "arrived_at" not in names:
            return cls(prompts, outputs)
        times = _column(rows, "arrived_at", path)
        return cls(prompts, outputs, times).rows(np.argsort(times, kind="stable"))

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    @property
    def rate(self) -> float:
        """Mean requests per second of a trace with arrival times."""
        assert self.arrival_seconds is not None
        return len(self) / max(float(np.ptp(self.arrival_seconds)), 1e-9)

    def rows(self, index: np.ndarray | slice) -> Self:
        """Some of the requests."""
        times = self.arrival_seconds
        return type(self)(
            self.num_prompt_tokens[index], self.num_output_tokens[index], None if times is None else times[index]
        )


def _column(rows: list[dict[str, str]], name: str, path: str) -> np.ndarray:
    try:
        return np.array([float(row[name]) for row in rows])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trace_file must hold numbers, {path!r} has in column {name}: {error}") from None
