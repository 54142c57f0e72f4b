"""The engine's own pipeline (engine/forward.py): stages move together, in ticks of one padded size."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxserve.scheduler.buckets import bubble_share, bucket_of
from jaxserve.simulator.cost import CostModel, Span
from jaxserve.simulator.pipeline import Pipeline


class Tick(NamedTuple):
    """What the stages did in one tick. Their idle time, summed, is that of padding, emptiness and imbalance."""

    start_seconds: float
    seconds: float
    """Of the slowest stage at the tick's bucket."""
    own_seconds: tuple[float, ...]
    """What each stage's micro-batch takes at its own size; 0 where there is none."""
    bubble_share: float
    """Of rows, as the engine counts it."""

    @property
    def idle_seconds(self) -> float:
        return len(self.own_seconds) * self.seconds - sum(self.own_seconds)

    @property
    def padding_seconds(self) -> float:
        """All stages' share of what the tick takes longer than its slowest micro-batch at its own size."""
        return len(self.own_seconds) * (self.seconds - max(self.own_seconds))

    @property
    def empty_seconds(self) -> float:
        """The slowest micro-batch's time, in stages that have none."""
        return self.own_seconds.count(0.0) * max(self.own_seconds)

    @property
    def imbalance_seconds(self) -> float:
        """How much sooner than the slowest one the other micro-batches would be ready."""
        return self.idle_seconds - self.padding_seconds - self.empty_seconds


@dataclass
class _MicroBatch[S: Span]:
    spans: Sequence[S]
    num_tokens: int
    own_seconds: Sequence[float]
    padded_seconds: dict[int, Sequence[float]] = field(default_factory=dict)
    """By bucket; of every stage, as ``own_seconds``."""


class TickPipeline[S: Span](Pipeline[S]):
    """All stages hand their micro-batches on at once, when the slowest is ready.

    Every stage computes as many rows as the bucket of the largest micro-batch has, be they padding only. Where the
    stages have work and no micro-batch is there to enter, an empty one does.
    """

    def __init__(self, cost: CostModel, buckets: Sequence[int]) -> None:
        super().__init__(cost)
        self.buckets = buckets
        self.ticks: list[Tick] = []
        nothing = self._micro_batch(())
        self._stages = deque([nothing] * cost.num_stages, maxlen=cost.num_stages)

    @property
    def has_work(self) -> bool:
        return any(batch.spans for batch in list(self._stages)[:-1])

    def enter(self, now: float, spans: Sequence[S]) -> None:
        if not spans and not self.has_work:
            return
        self._stages.appendleft(self._micro_batch(spans))
        tick = self._tick(now)
        self.ticks.append(tick)
        for stage, seconds in enumerate(tick.own_seconds):
            self.bubble_seconds[stage] += tick.seconds - seconds
            self.busy_seconds[stage] += seconds
        self.free_seconds = [now + tick.seconds] * self.num_stages
        self.leaving.append((now + tick.seconds, self._stages[-1].spans))

    def _micro_batch(self, spans: Sequence[S]) -> _MicroBatch[S]:
        own = self.cost.stage_seconds(spans) if spans else (0.0,) * self.num_stages
        return _MicroBatch(spans, sum(span.num_tokens for span in spans), own)

    def _tick(self, now: float) -> Tick:
        stage_tokens = [batch.num_tokens for batch in self._stages]
        num_rows = bucket_of(max(stage_tokens), self.buckets)
        for batch in self._stages:
            if num_rows not in batch.padded_seconds:
                batch.padded_seconds[num_rows] = self.cost.stage_seconds(batch.spans, num_rows)
        return Tick(
            start_seconds=now,
            seconds=max(batch.padded_seconds[num_rows][stage] for stage, batch in enumerate(self._stages)),
            own_seconds=tuple(batch.own_seconds[stage] for stage, batch in enumerate(self._stages)),
            bubble_share=bubble_share(stage_tokens, num_rows),
        )
