"""Batching policies. Plain Python: nothing here imports jax, so the simulator can drive the same classes."""

from collections.abc import Sequence
from typing import Unpack

from jaxserve.scheduler.adaptive import AdaptiveScheduler, Pace
from jaxserve.scheduler.base import Batch, Chunk, Limits, Scheduler
from jaxserve.scheduler.chunked_only import ChunkedOnlyScheduler
from jaxserve.scheduler.decode_first import DecodeFirstScheduler
from jaxserve.scheduler.hybrid_only import HybridOnlyScheduler
from jaxserve.scheduler.orca import OrcaScheduler
from jaxserve.scheduler.prefill_first import PrefillFirstScheduler
from jaxserve.scheduler.sarathi import SarathiScheduler

__all__ = ["POLICIES", "Batch", "Chunk", "Limits", "Pace", "Scheduler", "make_scheduler"]

POLICIES: dict[str, type[Scheduler]] = {
    "sarathi": SarathiScheduler,
    "adaptive": AdaptiveScheduler,
    "prefill_first": PrefillFirstScheduler,
    "orca": OrcaScheduler,
    "decode_first": DecodeFirstScheduler,
    "chunked_only": ChunkedOnlyScheduler,
    "hybrid_only": HybridOnlyScheduler,
}


def make_scheduler(
    name: str, *, chunk_schedule: Sequence[int] = (), pace: Pace | None = None, **limits: Unpack[Limits]
) -> Scheduler:
    """The policy of that name; ``chunk_schedule`` is sarathi's, ``pace`` adaptive's."""
    if name == "sarathi":
        return SarathiScheduler(chunk_schedule, **limits)
    if name == "adaptive" and pace is not None:
        return AdaptiveScheduler(pace, **limits)
    return POLICIES[name](**limits)
