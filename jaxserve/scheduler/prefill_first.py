"""The baseline: vLLM's policy of 2023. Prompts first and whole; running decodes wait (a generation stall)."""

from __future__ import annotations

from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.whole_prompts import WholePromptScheduler


class PrefillFirstScheduler(WholePromptScheduler):
    """A step prefills as many whole prompts as fit, or else decodes every running request."""

    name = "prefill_first"

    def _fill(self, batch: Batch) -> None:
        self._admit_whole(batch)
        if not batch.chunks:
            self._grant_decodes(batch)
