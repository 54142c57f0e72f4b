"""Sarathi-Serve's stall-free batching (arXiv 2403.02310, Algorithm 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxserve.errors import ConfigError
from jaxserve.request import Request
from jaxserve.scheduler.base import Limits
from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.chunked import ChunkedPrefillScheduler

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig


class SarathiScheduler(ChunkedPrefillScheduler):
    """Every running decode first, then prefills under way, then new requests in what is left of the token budget.

    No decode ever waits for a prefill, and no batch exceeds the budget.

    With ``chunk_budgets``, falling budgets of at least ``max_num_seqs``, a batch takes a prefill's chunk only up to
    the budget of the prefill's stage; the stages part ``max_model_len`` evenly. Later chunks read more keys, so a step
    of fewer tokens takes as long (the dynamic chunking schedule of the paper's code).
    """

    name = "sarathi"

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._stage_budgets = limits.chunk_budgets or (limits.token_budget,)

    @staticmethod
    def check_options(config: EngineConfig) -> None:
        if config.chunk_schedule is None:
            return
        if config.scheduler != SarathiScheduler.name or config.token_budget == "auto":
            raise ConfigError(
                f"chunk_schedule is for the scheduler {SarathiScheduler.name} with a token_budget in tokens, "
                f"got {config.scheduler} with {config.token_budget}"
            )
        try:
            budgets = config.chunk_budgets
        except ValueError:
            budgets = ()
        # Fewer than max_num_seqs, and decodes could keep a prefill out for as long as they run.
        falling = budgets == tuple(sorted(budgets, reverse=True))
        if not budgets or not falling or budgets[0] > config.token_budget or budgets[-1] < config.max_num_seqs:
            raise ConfigError(
                f"chunk_schedule must be falling integers from token_budget {config.token_budget} down to max_num_seqs "
                f"{config.max_num_seqs}, separated by commas, got {config.chunk_schedule!r}"
            )

    def _fill(self, batch: Batch) -> None:
        self._grant_decodes(batch)
        self._grant_chunks(batch)

    def _chunk_tokens(self, batch: Batch, request: Request) -> int:
        stage = request.num_computed_tokens * len(self._stage_budgets) // self.limits.max_model_len
        return min(super()._chunk_tokens(batch, request), self._stage_budgets[stage] - batch.num_tokens)
