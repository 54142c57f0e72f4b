"""When micro-batches pass through the stages of a pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from jaxserve.simulator.cost import CostModel, Span


class Pipeline[S: Span](ABC):
    """Stages that work on one micro-batch each; micro-batches pass through all of them in order of entry.

    A stage's *bubble* is the time in which it does no work on a micro-batch although some stage has one.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.free_seconds = [0.0] * cost.num_stages
        """When each stage has left its last micro-batch."""
        self.busy_seconds = [0.0] * cost.num_stages
        self.bubble_seconds = [0.0] * cost.num_stages
        self.leaving: deque[tuple[float, Sequence[S]]] = deque()
        """Micro-batches of which it is known when they leave the last stage, in order; to be taken out then."""

    @property
    def num_stages(self) -> int:
        return self.cost.num_stages

    @property
    def bubble_share(self) -> float:
        """Of the time in which the pipeline has had work, the average stage's share of waiting."""
        return sum(self.bubble_seconds) / (sum(self.busy_seconds) + sum(self.bubble_seconds))

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether a micro-batch is in any stage."""

    def accepts(self, now: float) -> bool:
        """Whether a micro-batch may enter."""
        return self.free_seconds[0] <= now

    @abstractmethod
    def enter(self, now: float, spans: Sequence[S]) -> None:
        """Send a micro-batch in at ``now``, which must be accepted; without spans there is none."""

    def idle_until(self, now: float) -> None:
        """Nothing has been asked of the pipeline from when its last stage was free until ``now``: that is no bubble."""
        drained = max(self.free_seconds)
        for stage, free in enumerate(self.free_seconds):
            self.bubble_seconds[stage] += drained - free
        self.free_seconds = [max(now, drained)] * self.num_stages


class AsynchronousPipeline[S: Span](Pipeline[S]):
    """A micro-batch enters a stage as soon as it has left the one before and its predecessor this one.

    A stage waits for the stage before it, whose micro-batch takes longer, or for requests whose last token is still in
    another stage.
    """

    @property
    def has_work(self) -> bool:
        return bool(self.leaving)

    def accepts(self, now: float) -> bool:
        return super().accepts(now) and len(self.leaving) < self.num_stages

    def enter(self, now: float, spans: Sequence[S]) -> None:
        if not spans:
            return
        for stage, seconds in enumerate(self.cost.stage_seconds(spans)):
            start = max(now, self.free_seconds[stage])
            self.bubble_seconds[stage] += start - self.free_seconds[stage]
            self.busy_seconds[stage] += seconds
            now = self.free_seconds[stage] = start + seconds
        self.leaving.append((now, spans))
