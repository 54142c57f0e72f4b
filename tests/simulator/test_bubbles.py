"""Idle time of a pipeline's stages, against what is told by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.workload import WorkloadConfig, WorkloadRequest
from jaxserve.simulator.bubbles import Bubbles, compare
from jaxserve.simulator.cost import Span, Tokens
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.devices import A100_80G
from jaxserve.simulator.pipeline import AsynchronousPipeline
from jaxserve.simulator.ticks import TickPipeline
from tests.simulator.models import MISTRAL_7B
from tests.simulator.token_cost import TokenCost, poisson, simulator_for


class FlatCost:
    """A quarter of a second in each of two stages, whatever they compute."""

    num_stages = 2

    def stage_seconds(self, spans: Iterable[Span], num_rows: int = 0) -> list[float]:
        return [0.25, 0.25]


def tokens(count: int) -> list[Tokens]:
    return [Tokens(0, count, True)]


def test_waiting_for_requests_is_no_bubble() -> None:
    pipeline = AsynchronousPipeline[Tokens](TokenCost(2))
    pipeline.enter(0.0, tokens(1000))
    pipeline.idle_until(10.0)
    assert pipeline.bubble_seconds == [1.0, 1.0]  # the second stage waits for the first, the first until it can go
    pipeline.enter(10.0, tokens(1000))
    pipeline.enter(11.0, tokens(3000))
    assert [seconds for seconds, _ in pipeline.leaving] == [2.0, 12.0, 17.0]
    assert pipeline.bubble_seconds == [1.0, 1.0 + 1.0 + 2.0]
    pipeline.idle_until(20.0)
    assert pipeline.bubble_seconds == [4.0, 4.0]
    assert pipeline.busy_seconds == [5.0, 5.0]


@pytest.mark.parametrize("lock_step", [False, True])
def test_equal_micro_batches_leave_no_bubble(lock_step: bool) -> None:
    """Prompts that fill the budget exactly: stages wait only while the pipeline fills and runs dry."""
    workload = [WorkloadRequest(0.0, 640, 1)] * 20
    run = simulator_for("sarathi", TokenCost(4), budget=64, num_blocks=4000, lock_step=lock_step).run(workload)
    assert run.bubble_seconds == pytest.approx([3 * 0.064] * 4)
    assert run.busy_seconds == pytest.approx([200 * 0.064] * 4)
    assert run.bubble_share == pytest.approx(3 / 203)
    assert run.num_batches == 200
    if lock_step:
        assert len(run.ticks) == 203
        assert [tick.idle_seconds for tick in run.ticks[3:-3]] == pytest.approx([0] * 197)
        assert [tick.bubble_share for tick in run.ticks[:5]] == [0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("lock_step", [False, True])
def test_one_request_leaves_one_of_two_stages_empty(lock_step: bool) -> None:
    run = simulator_for("sarathi", FlatCost(), budget=64, lock_step=lock_step).run([WorkloadRequest(0.0, 64, 40)])
    assert run.bubble_share == 0.5
    assert run.busy_seconds == run.bubble_seconds == (10, 10)
    for tick in run.ticks:
        assert (tick.padding_seconds, tick.imbalance_seconds, tick.empty_seconds) == (0, 0, 0.25)


def test_unequal_micro_batches_by_hand() -> None:
    """100 tokens, then 20, in buckets of 128, 128 and, when the first have left, 32 rows; a millisecond a row."""
    pipeline = TickPipeline[Tokens](TokenCost(2), (16, 32, 64, 128))
    now = 0.0
    for spans in (tokens(100), tokens(20), []):
        pipeline.enter(now, spans)
        now = pipeline.free_seconds[0]
    assert now == pytest.approx(0.288)
    assert [spans for _, spans in pipeline.leaving if spans] == [tokens(100), tokens(20)]
    assert [tick.start_seconds for tick in pipeline.ticks] == pytest.approx([0, 0.128, 0.256])
    assert [tick.own_seconds for tick in pipeline.ticks] == [(0.1, 0), (0.02, 0.1), (0, 0.02)]
    assert [tick.idle_seconds for tick in pipeline.ticks] == pytest.approx([0.156, 0.136, 0.044])
    assert [tick.padding_seconds for tick in pipeline.ticks] == pytest.approx([0.056, 0.056, 0.024])
    assert [tick.empty_seconds for tick in pipeline.ticks] == pytest.approx([0.1, 0, 0.02])
    assert [tick.imbalance_seconds for tick in pipeline.ticks] == pytest.approx([0, 0.08, 0])
    assert [tick.bubble_share for tick in pipeline.ticks] == [1 - 100 / 256, 1 - 120 / 256, 1 - 20 / 64]
    assert pipeline.bubble_share == pytest.approx(0.336 / (2 * 0.288))
    assert not pipeline.has_work
    pipeline.enter(now, [])
    assert len(pipeline.ticks) == 3, "nothing to move on, no tick"


def test_one_request_in_ticks_by_hand() -> None:
    """Chunks of 64 and 36 tokens in three ticks of 64 rows; then each token takes two of 16. Arrival at 5 s."""
    run = simulator_for("sarathi", TokenCost(2), budget=64, lock_step=True).run([WorkloadRequest(5.0, 100, 3)])
    assert run.requests[0].token_seconds == pytest.approx([5.192, 5.224, 5.256])
    assert len(run.ticks) == 7
    assert run.num_batches == 4
    assert run.busy_seconds == pytest.approx([0.102, 0.102])


@pytest.mark.parametrize("lock_step", [False, True])
def test_a_stage_works_or_waits(lock_step: bool) -> None:
    """While requests are there, each stage does one or the other: the sums are the same for all."""
    run = simulator_for("prefill_first", TokenCost(3), budget=512, lock_step=lock_step).run(poisson(40, 2.0))
    totals = [busy + bubble for busy, bubble in zip(run.busy_seconds, run.bubble_seconds, strict=True)]
    assert totals == pytest.approx([totals[0]] * 3)
    assert totals[0] <= run.seconds + 1e-9


def test_whole_prompts_leave_bubbles() -> None:
    shares = {}
    for policy, budget in (("sarathi", 64), ("prefill_first", 512)):
        simulator = simulator_for(policy, TokenCost(4), budget=budget, num_blocks=4000, max_num_seqs=32)
        shares[policy] = simulator.run(poisson(100, 4.0, prompt=200, output=60)).bubble_share
    assert shares["sarathi"] < 0.5 * shares["prefill_first"]


@pytest.fixture(scope="module")
def compared() -> dict[str, Bubbles]:
    deployment = Deployment(model=MISTRAL_7B, device=A100_80G, pipeline=2, max_model_len=4096)
    return compare(deployment, ("sarathi", "prefill_first"), WorkloadConfig(rate=8.0, num_requests=40))


def test_stall_free_batches_leave_less_idle(compared: dict[str, Bubbles]) -> None:
    ours, theirs = compared["sarathi"], compared["prefill_first"]
    assert idle(ours) < 0.5 * idle(theirs)
    assert ours.asynchronous.loaded_bubble_share < 0.5 * theirs.asynchronous.loaded_bubble_share


def test_parts_of_idle_time(compared: dict[str, Bubbles]) -> None:
    for found in compared.values():
        parts = [
            found.share(part)
            for part in (lambda t: t.padding_seconds, lambda t: t.imbalance_seconds, lambda t: t.empty_seconds)
        ]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(idle(found))
        assert idle(found) == pytest.approx(found.lock_step.loaded_bubble_share)
        assert len(found.ticks) < len(found.lock_step.ticks)
        assert 0 < found.idle_rows_share < 1


def idle(found: Bubbles) -> float:
    return found.share(lambda tick: tick.idle_seconds)


def test_a_pipeline_is_needed() -> None:
    deployment = Deployment(model=MISTRAL_7B, device=A100_80G)
    with pytest.raises(ConfigError, match="pipeline must be at least 2 for its stages to wait, got 1"):
        compare(deployment, ("sarathi",), WorkloadConfig())
