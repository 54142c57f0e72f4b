"""When micro-batches pass through the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence


class Pipeline:
    """Stages that work on one micro-batch each, in order of entry; a micro-batch leaves one before it enters the next.

    A stage's *bubble* is the time in which it waits although the pipeline has work: for the stage before it, whose
    micro-batch takes longer, or for requests whose last token is still in another stage.
    """

    def __init__(self, num_stages: int) -> None:
        self.free_seconds = [0.0] * num_stages
        """When each stage has left its last micro-batch."""
        self.busy_seconds = [0.0] * num_stages
        self.bubble_seconds = [0.0] * num_stages

    @property
    def num_stages(self) -> int:
        return len(self.free_seconds)

    def enter(self, now: float, stage_seconds: Sequence[float]) -> float:
        """Send a micro-batch in at ``now``, which the first stage must allow; returns when it leaves the last one."""
        for stage, seconds in enumerate(stage_seconds):
            start = max(now, self.free_seconds[stage])
            self.bubble_seconds[stage] += start - self.free_seconds[stage]
            self.busy_seconds[stage] += seconds
            now = self.free_seconds[stage] = start + seconds
        return now

    def idle_until(self, now: float) -> None:
        """Nothing has been asked of the pipeline until ``now``: no stage's wait up to here is a bubble."""
        self.free_seconds = [max(now, free) for free in self.free_seconds]
