"""Sarathi-Serve's stall-free batching (arXiv 2403.02310, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from jaxserve.request import Request
from jaxserve.scheduler.base import Batch, Limits
from jaxserve.scheduler.chunked import ChunkedPrefillScheduler


class SarathiScheduler(ChunkedPrefillScheduler):
    """Every running decode first, then prefills under way, then new requests in what is left of the token budget.

    No decode ever waits for a prefill, and no batch exceeds the budget.

    With a ``chunk_schedule``, falling budgets of at least ``max_num_seqs``, a batch takes a prefill's chunk only up to
    the budget of the prefill's stage; the stages part ``max_model_len`` evenly. Later chunks read more keys, so a step
    of fewer tokens takes as long (the dynamic chunking schedule of the paper's code).
    """

    def __init__(self, chunk_schedule: Sequence[int] = (), **limits: Unpack[Limits]) -> None:
        super().__init__(**limits)
        self._stage_budgets = chunk_schedule or (self.token_budget,)

    def _fill(self, batch: Batch) -> None:
        self._grant_decodes(batch)
        self._grant_chunks(batch)

    def _chunk_tokens(self, batch: Batch, request: Request) -> int:
        stage = request.num_computed_tokens * len(self._stage_budgets) // self.max_model_len
        return min(super()._chunk_tokens(batch, request), self._stage_budgets[stage] - batch.num_tokens)
