"""Sarathi-Serve's stall-free batching (arXiv 2403.02310, Algorithm 3)."""

from __future__ import annotations

from jaxserve.scheduler.base import Batch, Scheduler


class SarathiScheduler(Scheduler):
    """Every running decode first, then prefills under way, then new requests in what is left of the token budget.

    No decode ever waits for a prefill, and no batch exceeds the budget.
    """

    def _fill(self, batch: Batch) -> None:
        for request in self._decodes():
            self._grant(batch, request, 1)
        for request in self._prefills():
            self._grant(batch, request, request.num_uncomputed_tokens)
        while self._can_admit(batch):
            request = next(iter(self.waiting.values()))
            self._admit(request)
            self._grant(batch, request, request.num_uncomputed_tokens)

    def _can_admit(self, batch: Batch) -> bool:
        # A free block is kept for each running sequence: admitting into the last ones would only lead to preemption.
        return bool(
            self.waiting
            and not batch.preempted
            and batch.budget_left
            and len(self.running) < self.max_num_seqs
            and self.blocks.num_free > len(self.running)
        )
