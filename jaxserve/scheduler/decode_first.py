"""FasterTransformer's request-level batching, as the code of arXiv 2403.02310 has it."""

from __future__ import annotations

from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.whole_prompts import WholePromptScheduler


class DecodeFirstScheduler(WholePromptScheduler):
    """Requests are admitted, in one batch of whole prompts, when nothing runs; then they decode until all have ended.

    Nobody ever waits between two tokens, but the batch shrinks as its requests end, and throughput with it.
    """

    name = "decode_first"
    reserves = True

    def _fill(self, batch: Batch) -> None:
        if self.running:
            self._grant_decodes(batch)
        else:
            self._admit_whole(batch)
