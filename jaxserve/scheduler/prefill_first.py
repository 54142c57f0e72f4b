"""The baseline: vLLM's policy of 2023. Prompts first and whole; running decodes wait (a generation stall)."""

from __future__ import annotations

from jaxserve.scheduler.base import Batch, Scheduler


class PrefillFirstScheduler(Scheduler):
    """A step prefills as many whole prompts as fit, or else decodes every running request."""

    def _fill(self, batch: Batch) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = next(iter(self.waiting.values()))
            fits = request.num_uncomputed_tokens <= min(batch.budget_left, self.blocks.room(request.request_id))
            if not fits:
                break
            self._admit(request)
            self._grant(batch, request, request.num_uncomputed_tokens)
        if not batch.chunks:
            for request in self._decodes():
                self._grant(batch, request, 1)
