"""What a stage is, and what it is given to work with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.evaluation.gpu_check.records import Recorder

ROOT = Path(__file__).parents[3]
"""Of the checkout: scripts, and files of tests."""


class StageFailed(Exception):
    """What a stage checked is wrong; its records say what."""


@dataclass(frozen=True)
class Stage:
    """One step of the check, in a process group of its own: ``run(context)`` of ``module`` in this package."""

    name: str
    module: str
    least_seconds: float
    """With less left it is not begun."""
    limit_seconds: float
    """After that it is ended."""
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    """For ``Context.arguments``."""
    needs_graphs: bool = False
    """Where it does not pass, later stages make no CUDA graphs."""
    hangs: bool = False
    """On purpose: it is right when it is ended."""


@dataclass(frozen=True)
class Context:
    """What a stage's process is told. It should be done by ``deadline``, on the clock of ``time.monotonic``."""

    name: str
    out: Path
    records: Recorder
    deadline: float
    tiny: bool
    """On any machine, with as little work as possible."""
    arguments: Sequence[str]

    @property
    def left_seconds(self) -> float:
        return self.deadline - time.monotonic()
