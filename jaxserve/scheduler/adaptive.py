"""Stall-free batching whose budget follows the step-time model instead of being fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from jaxserve.request import Request
from jaxserve.scheduler.base import Batch, Limits
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.scheduler.sarathi import SarathiScheduler
from jaxserve.scheduler.step_time import BatchShape, RelativeError, StepTimeModel


@dataclass(frozen=True)
class Pace:
    """How fast steps must be, and how fast they are."""

    step_seconds: float
    """Most that a step with decodes may be predicted to take."""
    step_time: StepTimeModel

    @classmethod
    def of(cls, slo_tbt_seconds: float, step_time: StepTimeModel, error: RelativeError) -> Pace:
        """An objective for the P99 of the TBT, with room for predictions that are as wrong as one in ten is."""
        return cls(slo_tbt_seconds / (1 + error.p90), step_time)


class AdaptiveScheduler(SarathiScheduler):
    """Sarathi's batches, each filled as far as its predicted time meets the objective.

    A fixed budget is profiled for the worst batch (arXiv 2403.02310, section 4.3); with fewer decodes or shorter
    contexts a step takes less, and that slack goes to prefills here. Decodes are never left out, so where they alone
    exceed the objective prefills wait for some to end. Without decodes nobody waits for a next token, and
    ``token_budget`` is the only limit.
    """

    def __init__(self, pace: Pace, **limits: Unpack[Limits]) -> None:
        super().__init__(**limits)
        self._pace = pace
        self._buckets = token_buckets(self.token_budget)

    def predict(self, batch: Batch) -> float:
        """Seconds that the batch will take."""
        return self._pace.step_time.predict(self._shape(batch))

    def _shape(self, batch: Batch) -> BatchShape:
        return BatchShape.of(batch.chunks.values(), self._buckets, self.window)

    def _chunk_tokens(self, batch: Batch, request: Request) -> int:
        most = super()._chunk_tokens(batch, request)
        shape = self._shape(batch)
        if not shape.num_decodes:
            return most
        start, fits = request.num_computed_tokens, 0
        while fits < most:
            num_tokens = (fits + most + 1) // 2
            larger = shape.with_chunk(start, num_tokens, self._buckets, self.window)
            if self._pace.step_time.predict(larger) <= self._pace.step_seconds:
                fits = num_tokens
            else:
                most = num_tokens - 1
        return fits
