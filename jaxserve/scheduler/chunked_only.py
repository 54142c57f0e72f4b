"""Half of Sarathi-Serve, for the ablation of arXiv 2403.02310: chunked prefills, but no hybrid batches."""

from __future__ import annotations

from jaxserve.scheduler.base import Limits
from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.chunked import ChunkedPrefillScheduler


class ChunkedOnlyScheduler(ChunkedPrefillScheduler):
    """Batches of chunks and batches of decodes take turns, so a decode waits for at most one budget of prefill."""

    name = "chunked_only"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._decodes_are_next = False

    def _fill(self, batch: Batch) -> None:
        if not (self._decodes_are_next and batch.decode_candidates):
            self._grant_chunks(batch)
        self._decodes_are_next = bool(batch.chunks)
        if not batch.chunks:
            self._grant_decodes(batch)
