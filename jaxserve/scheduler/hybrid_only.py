"""Half of Sarathi-Serve, for the ablation of arXiv 2403.02310: hybrid batches, but no chunked prefills."""

from __future__ import annotations

from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.whole_prompts import WholePromptScheduler


class HybridOnlyScheduler(WholePromptScheduler):
    """Every running decode, and as many whole prompts as fit beside them: a long one stretches the step for all."""

    name = "hybrid_only"

    def _fill(self, batch: Batch) -> None:
        self._grant_decodes(batch)
        self._admit_whole(batch)
