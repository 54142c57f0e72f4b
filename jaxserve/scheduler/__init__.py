"""Batching policies. Plain Python: nothing here imports jax, so the simulator can drive the same classes."""

from jaxserve.scheduler.adaptive import AdaptiveScheduler
from jaxserve.scheduler.base import Limits, Scheduler
from jaxserve.scheduler.batch import Batch, Chunk
from jaxserve.scheduler.chunked_only import ChunkedOnlyScheduler
from jaxserve.scheduler.decode_first import DecodeFirstScheduler
from jaxserve.scheduler.hybrid_only import HybridOnlyScheduler
from jaxserve.scheduler.orca import OrcaScheduler
from jaxserve.scheduler.prefill_first import PrefillFirstScheduler
from jaxserve.scheduler.sarathi import SarathiScheduler
from jaxserve.scheduler.speculation import Speculation
from jaxserve.scheduler.step_time import Pace

__all__ = ["POLICIES", "Batch", "Chunk", "Limits", "Pace", "Scheduler", "Speculation"]

POLICIES: dict[str, type[Scheduler]] = {
    policy.name: policy
    for policy in (
        SarathiScheduler,
        AdaptiveScheduler,
        PrefillFirstScheduler,
        OrcaScheduler,
        DecodeFirstScheduler,
        ChunkedOnlyScheduler,
        HybridOnlyScheduler,
    )
}
