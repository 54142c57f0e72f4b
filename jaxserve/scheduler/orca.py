"""Orca's iteration-level batching (Yu et al., OSDI'22), as the code of arXiv 2403.02310 has it."""

from __future__ import annotations

from jaxserve.scheduler.hybrid_only import HybridOnlyScheduler


class OrcaScheduler(HybridOnlyScheduler):
    """Hybrid batches from the days before paged KV caches: each request holds memory for the longest one."""

    name = "orca"
    reserves = True
