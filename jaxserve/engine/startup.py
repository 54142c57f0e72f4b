"""Where the time between a start and the first request goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class StartupTimes(NamedTuple):
    """Everything comes one after the other, but on CPUs weights are loaded beside the compilation."""

    imports_seconds: float
    """Of jax and the engine, where the front end imported them late; else 0."""
    weights_seconds: float
    compile_seconds: float
    loading_seconds: float
    """Of both together."""
    warm_up_seconds: float
    """First runs of the programs, see ModelRunner."""
    total_seconds: float

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by name. ``other``: files opened, the tokenizer, the cache's memory, profiling."""
        return {
            "imports": self.imports_seconds,
            "weights": self.weights_seconds,
            "compile": self.compile_seconds,
            "warm_up": self.warm_up_seconds,
            "other": self.total_seconds - self.imports_seconds - self.loading_seconds - self.warm_up_seconds,
        }

    def __str__(self) -> str:
        imports, weights, compiling, warm_up, other = (f"{seconds:.1f}" for seconds in self.phases.values())
        return (
            f"started in {self.total_seconds:.1f} s: imports {imports}, weights {weights} and compile {compiling} "
            f"(together {self.loading_seconds:.1f}), warm-up {warm_up}, other {other}"
        )


def timed[Result](function: Callable[..., Result], *args: object) -> tuple[Result, float]:
    """What the function returns, and the seconds it took."""
    start = time.monotonic()
    return function(*args), time.monotonic() - start
