"""When requests come: gaps with a mean of one, so that a rate only stretches them."""

from __future__ import annotations

import numpy as np


def poisson_seconds(random: np.random.Generator, count: int, rate: float) -> np.ndarray:
    """Arrival times of a Poisson process: independent exponential gaps."""
    return np.cumsum(random.standard_exponential(count)) / rate


def gamma_seconds(random: np.random.Generator, count: int, rate: float, cv: float) -> np.ndarray:
    """Arrival times with gamma gaps of coefficient of variation ``cv``: 1 is Poisson, above it comes in bursts."""
    shape = cv**-2
    return np.cumsum(random.standard_gamma(shape, count) / shape) / rate


def trace_seconds(recorded_seconds: np.ndarray, rate: float | None) -> np.ndarray:
    """Recorded times from their first on, stretched so that they come at ``rate`` on average; as they are for None."""
    times = recorded_seconds - recorded_seconds[0]
    if rate is None or times[-1] == 0:
        return times
    return times * ((len(times) - 1) / rate / times[-1])
