"""The step-time model of a simulated device, for the adaptive policy: what profiling would have measured there."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.scheduler import Pace
from jaxserve.scheduler.step_time import BatchShape, Sample, StepTimeModel, held_out_error, num_seen_keys
from jaxserve.simulator.cost import CostModel, Tokens, decodes

PREFILL_ALONE, HALF, FULL = 0.0, 0.5, 1.0


def fit_pace(
    slo_tbt_seconds: float,
    cost: CostModel,
    buckets: Sequence[int],
    *,
    max_num_seqs: int,
    contexts: Sequence[int],
    window: int | None,
) -> Pace:
    """Fitted to batches of every bucket, without, with half and with all sequences decoding, at ``contexts`` tokens."""
    samples = [
        _sample(cost, rows, min(rows, int(share * max_num_seqs)), context, window)
        for rows in buckets
        for share in (PREFILL_ALONE, HALF, FULL)
        for context in contexts
    ]
    return Pace.of(slo_tbt_seconds, StepTimeModel.fit(samples), held_out_error(samples))


def _sample(cost: CostModel, rows: int, num_decodes: int, context: int, window: int | None) -> Sample:
    chunk = rows - num_decodes
    start = max(0, context - chunk)
    spans = decodes(num_decodes, context) + ([Tokens(start, chunk, True)] if chunk else [])
    shape = BatchShape(
        rows,
        num_decodes,
        num_decodes * num_seen_keys(context - 1, 1, window),
        chunk,
        num_seen_keys(start, chunk, window),
    )
    return Sample(shape, sum(cost.stage_seconds(spans)))
