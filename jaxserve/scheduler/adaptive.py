"""Stall-free batching whose budget follows the step-time model instead of being fixed."""

from __future__ import annotations

from jaxserve.request import Request
from jaxserve.scheduler.base import Limits
from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.scheduler.sarathi import SarathiScheduler
from jaxserve.scheduler.step_time import BatchShape


class AdaptiveScheduler(SarathiScheduler):
    """Sarathi's batches, each filled as far as its predicted time meets the objective.

    A fixed budget is profiled for the worst batch (arXiv 2403.02310, section 4.3); with fewer decodes or shorter
    contexts a step takes less, and that slack goes to prefills here. Decodes are never left out, so where they alone
    exceed the objective prefills wait for some to end. Without decodes nobody waits for a next token, and
    ``token_budget`` is the only limit.
    """

    name = "adaptive"
    needs_step_times = True

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        assert limits.pace is not None, "checked by the configuration"
        self._pace = limits.pace
        self._buckets = token_buckets(limits.token_budget)

    def _chunk_tokens(self, batch: Batch, request: Request) -> int:
        most = super()._chunk_tokens(batch, request)
        shape = BatchShape.of(batch.chunks.values(), self._buckets, self.limits.window)
        if not shape.num_decodes:
            return most
        start, fits = request.num_computed_tokens, 0
        while fits < most:
            num_tokens = (fits + most + 1) // 2
            larger = shape.with_chunk(start, num_tokens, self._buckets, self.limits.window)
            if self._pace.step_time.predict(larger) <= self._pace.step_seconds:
                fits = num_tokens
            else:
                most = num_tokens - 1
        return fits
