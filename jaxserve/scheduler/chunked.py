"""What the policies share that prefill in chunks."""

from __future__ import annotations

from jaxserve.request import Request
from jaxserve.scheduler.base import Scheduler
from jaxserve.scheduler.batch import Batch


class ChunkedPrefillScheduler(Scheduler):
    """A prompt is cut into chunks wherever a batch is full; its blocks are taken chunk by chunk, once all are free."""

    def _chunk_tokens(self, batch: Batch, request: Request) -> int:
        """How many tokens of the request's prefill ``batch`` may take."""
        return min(request.num_uncomputed_tokens, batch.budget_left)

    def _grant_chunks(self, batch: Batch) -> None:
        """Prefills under way, then new requests, in what is left of the budget."""
        for request in batch.prefill_candidates:
            self._grant(batch, request, self._chunk_tokens(batch, request))
        while (waiting := self._next_waiting(batch)) is not None and self._has_room(batch, waiting):
            num_tokens = self._chunk_tokens(batch, waiting)
            if num_tokens <= 0:
                break
            self._admit(batch, waiting)
            self._grant(batch, waiting, num_tokens)
