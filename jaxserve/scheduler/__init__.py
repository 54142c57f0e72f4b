"""Batching policies. Plain Python: nothing here imports jax, so the simulator can drive the same classes."""

from jaxserve.engine.blocks import BlockManager
from jaxserve.scheduler.base import Batch, Chunk, Scheduler
from jaxserve.scheduler.prefill_first import PrefillFirstScheduler
from jaxserve.scheduler.sarathi import SarathiScheduler

__all__ = ["Batch", "Chunk", "PrefillFirstScheduler", "SarathiScheduler", "Scheduler", "make_scheduler"]

POLICIES: dict[str, type[Scheduler]] = {"sarathi": SarathiScheduler, "prefill_first": PrefillFirstScheduler}


def make_scheduler(
    name: str, *, token_budget: int, max_num_seqs: int, blocks: BlockManager, window: int | None = None
) -> Scheduler:
    return POLICIES[name](token_budget=token_budget, max_num_seqs=max_num_seqs, blocks=blocks, window=window)
