"""The properties that define each batching policy, over random arrivals, stops and aborts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler import POLICIES, Batch, Limits, Pace, Scheduler
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.scheduler.step_time import BatchShape, StepTimeModel
from tests.scheduler.driver import (
    BLOCK_SIZE,
    MAX_LEN,
    Driver,
    Workload,
    block_table,
    make_request,
    most_blocks,
    run,
    workloads,
)

WHOLE_PROMPT_POLICIES = [name for name, policy in POLICIES.items() if policy.runs_whole_prompts]


def make(
    policy: str,
    token_budget: int,
    max_num_seqs: int,
    *,
    num_blocks: int = 500,
    window: int | None = None,
    chunk_budgets: tuple[int, ...] = (),
    pace: Pace | None = None,
) -> Scheduler:
    limits = Limits(
        token_budget=token_budget,
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_LEN,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        window=window,
        chunk_budgets=chunk_budgets,
        pace=pace,
    )
    return POLICIES[policy](limits)


def num_prefill_tokens(batch: Batch) -> list[int]:
    return [chunk.num_tokens for chunk in batch.chunks.values() if not chunk.request.output_token_ids]


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_sarathi_leaves_no_decode_out(workload: Workload) -> None:
    scheduler = workload.scheduler("sarathi")
    for step in run(scheduler, workload):
        for request in step.decodes:
            assert request.request_id in step.batch.chunks or request in step.batch.preempted
        for request in scheduler.running:
            held = [block for block in block_table(scheduler.blocks, request.slot) if block]
            assert len(held) <= most_blocks(workload.limits.window, workload.limits.token_budget)
    assert all(r.metrics.num_stalls == 0 for r in workload.requests)


@settings(max_examples=150, deadline=None)
@given(workloads(windows=st.none()))
def test_nobody_is_admitted_who_will_be_thrown_out_before_the_first_token(workload: Workload) -> None:
    """So what is ever computed again is at most what others' outputs had been given before."""
    scheduler, computed = workload.scheduler("sarathi"), Counter[str]()
    for step in run(scheduler, workload):
        computed.update({id: chunk.num_tokens for id, chunk in step.batch.chunks.items()})
        assert not [r for r in step.batch.preempted if r.num_tokens == r.num_prompt_tokens]
    for request in workload.requests:
        assert computed[request.request_id] <= (1 + request.metrics.num_preemptions) * (request.num_tokens - 1)


@settings(max_examples=100, deadline=None)
@given(workloads(), st.data())
def test_sarathi_with_a_chunk_schedule(workload: Workload, data: st.DataObject) -> None:
    """A prefill takes a batch no further than the budget of its stage."""
    budget, max_num_seqs = workload.limits.token_budget, workload.limits.max_num_seqs
    stages = sorted(data.draw(st.lists(st.integers(max_num_seqs, budget), min_size=1, max_size=5)), reverse=True)
    scheduler = workload.scheduler("sarathi", chunk_budgets=stages)
    for step in run(scheduler, workload):
        num_tokens = 0
        for chunk in step.batch.chunks.values():
            num_tokens += chunk.num_tokens
            if chunk.request not in step.decodes:
                assert num_tokens <= stages[int(chunk.start / (MAX_LEN / len(stages)))]
    assert all(r.metrics.num_stalls == 0 for r in workload.requests)


MODEL = StepTimeModel({16: 16.0, 32: 20.0, 64: 40.0}, seconds_per_kv_token=0.1, seconds_per_pair=0.01)


@settings(max_examples=150, deadline=None)
@given(workloads(), st.floats(10.0, 100.0))
def test_adaptive_keeps_mixed_batches_within_the_objective(workload: Workload, slo_tbt_seconds: float) -> None:
    scheduler = workload.scheduler("adaptive", pace=Pace(slo_tbt_seconds, MODEL))
    limits = workload.limits
    for step in run(scheduler, workload):
        chunks = step.batch.chunks.values()
        for request in step.decodes:
            assert request.request_id in step.batch.chunks or request in step.batch.preempted
        if {chunk.request in step.decodes for chunk in chunks} == {True, False}:
            shape = BatchShape.of(chunks, token_buckets(limits.token_budget), limits.window)
            assert MODEL.predict(shape) <= slo_tbt_seconds
    assert all(r.metrics.num_stalls == 0 for r in workload.requests)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 7), st.integers(1, 80), st.floats(10.0, 100.0))
def test_adaptive_uses_the_slack(num_decodes: int, prompt: int, slo_tbt_seconds: float) -> None:
    """One token more of the chunk would break the objective, or the budget, or there is none."""
    scheduler = make("adaptive", 48, 8, pace=Pace(slo_tbt_seconds, MODEL))
    driver = Driver(scheduler)
    for index in range(num_decodes):
        scheduler.add(make_request(index, 4, 64))
    driver.step(), driver.step()  # without decodes there is room for all of them at once
    scheduler.add(make_request(9, prompt, 2))
    batch = driver.step()
    chunk = batch.chunks.get("9")
    granted = chunk.num_tokens if chunk is not None else 0
    if granted < min(prompt, batch.budget - num_decodes):
        decodes = [c for name, c in batch.chunks.items() if name != "9"]
        shape = BatchShape.of(decodes, token_buckets(48)).with_chunk(0, granted + 1, token_buckets(48))
        assert MODEL.predict(shape) > slo_tbt_seconds


@settings(max_examples=100, deadline=None)
@given(workloads())
def test_chunked_only_never_mixes_and_takes_turns(workload: Workload) -> None:
    scheduler = workload.scheduler("chunked_only")
    turns: list[bool] = []
    for step in run(scheduler, workload):
        decoding = {chunk.request in step.decodes for chunk in step.batch.chunks.values()}
        assert len(decoding) <= 1
        if decoding == {False} and turns and not turns[-1]:
            assert not step.decodes, "prefills go on only where there is nothing to decode"
        turns += decoding


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(WHOLE_PROMPT_POLICIES), workloads(whole_prompts=True))
def test_prompts_stay_whole(name: str, workload: Workload) -> None:
    """So do recomputations after a preemption; and nobody starves, at the least budget and memory."""
    scheduler = workload.scheduler(name)
    for step in run(scheduler, workload):
        assert not step.prefills
        for request in step.admitted:
            assert step.batch.chunks[request.request_id].start == 0
            assert step.batch.chunks[request.request_id].samples


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["orca", "decode_first"]), workloads(whole_prompts=True))
def test_reservation(name: str, workload: Workload) -> None:
    """From admission to the end a request owns blocks for the longest one, but for those left behind a window."""
    scheduler = workload.scheduler(name)
    for step in run(scheduler, workload):
        assert not step.batch.preempted
        for request in scheduler.running:
            table = block_table(scheduler.blocks, request.slot)
            assert len(table) == MAX_LEN // BLOCK_SIZE
            assert workload.limits.window is not None or all(table)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["orca", "hybrid_only"]), workloads(whole_prompts=True))
def test_prompts_join_running_decodes(name: str, workload: Workload) -> None:
    scheduler = workload.scheduler(name)
    for step in run(scheduler, workload):
        for request in step.decodes:
            assert request.request_id in step.batch.chunks or request in step.batch.preempted
    assert all(r.metrics.num_stalls == 0 for r in workload.requests)


@settings(max_examples=100, deadline=None)
@given(workloads(whole_prompts=True))
def test_decode_first_admits_only_when_nothing_runs(workload: Workload) -> None:
    scheduler = workload.scheduler("decode_first")
    for step in run(scheduler, workload):
        assert not (step.admitted and step.running)
    assert all(r.metrics.num_stalls == 0 for r in workload.requests)


@settings(max_examples=100, deadline=None)
@given(workloads(whole_prompts=True))
def test_prefill_first_never_mixes(workload: Workload) -> None:
    scheduler = workload.scheduler("prefill_first")
    for step in run(scheduler, workload):
        assert not step.admitted or len(step.admitted) == len(step.batch.chunks)


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("sarathi", [[28], [28], [24, 4], [16], []]),
        ("chunked_only", [[32], [], [32], [], [16, 16]]),
        ("hybrid_only", [[80], [20], [], [], []]),
        ("orca", [[80], [20], [], [], []]),
        ("prefill_first", [[80], [20], [], [], []]),
        ("decode_first", [[], [], [], [], []]),
    ],
)
def test_a_long_prompt_then_a_short_one_among_four_decodes(name: str, prompts: list[list[int]]) -> None:
    """Prompt tokens in each of the next steps; the second prompt is too long to share the first one's batch."""
    scheduler = make(name, 96 if name in WHOLE_PROMPT_POLICIES else 32, 6)
    driver = Driver(scheduler)
    for index in range(4):
        scheduler.add(make_request(index, 4, 64))
    driver.step(), driver.step(), driver.step()
    scheduler.add(make_request(8, 80, 2))
    scheduler.add(make_request(9, 20, 2))
    assert [num_prefill_tokens(driver.step()) for _ in prompts] == prompts


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_first_come_first_served(prompts: list[int]) -> None:
    """Without memory pressure, requests start, and get their first token, in order of arrival."""
    scheduler = make("sarathi", 32, 4)
    driver, started = Driver(scheduler), []
    for index, prompt in enumerate(prompts):
        scheduler.add(make_request(index, prompt, 3))
    while scheduler.has_unfinished():
        started += [c.request.request_id for c in driver.step().chunks.values() if c.start == 0]
    assert started == [str(i) for i in range(len(prompts))]


def test_long_prompt_does_not_stall_decodes_and_fills_the_budget() -> None:
    scheduler = make("sarathi", 32, 8)
    driver = Driver(scheduler)
    for index in range(4):
        scheduler.add(make_request(index, 4, 64))
    driver.step(), driver.step()
    scheduler.add(make_request(9, 90, 2))
    for expected in (28, 28, 28, 6):
        batch = driver.step()
        assert [c.num_tokens for c in batch.chunks.values()] == [1, 1, 1, 1, expected]


def test_prefill_first_stalls_running_decodes() -> None:
    scheduler = make("prefill_first", 96, 8)
    driver = Driver(scheduler)
    request = make_request(0, 4, 64)
    scheduler.add(request)
    driver.step(), driver.step()
    scheduler.add(make_request(1, 90, 2))
    assert list(driver.step().chunks) == ["1"]
    assert request.metrics.num_stalls == 1


def test_latest_arrival_is_preempted_and_recomputed() -> None:
    scheduler = make("sarathi", 64, 4, num_blocks=1 + 12)
    driver = Driver(scheduler)
    first, second = make_request(0, 30, 40), make_request(1, 30, 40)
    scheduler.add(first), scheduler.add(second)
    while scheduler.has_unfinished():
        driver.step()
    assert first.metrics.num_preemptions == 0
    assert second.metrics.num_preemptions >= 1
    assert len(second.output_token_ids) == 40


def test_a_long_prompt_waits_until_it_has_room_to_stay() -> None:
    """It would fit beside the first request only until that one's output has grown."""
    scheduler = make("sarathi", 16, 4, num_blocks=1 + 12)
    driver, computed = Driver(scheduler), 0
    requests = [make_request(0, 40, 40), make_request(1, 80, 4)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_unfinished():
        computed += driver.step().num_tokens
    assert [r.metrics.num_preemptions for r in requests] == [0, 0]
    assert computed == 40 + 39 + 80 + 3


def test_two_prompts_that_exceed_the_memory_together_follow_each_other() -> None:
    scheduler = make("sarathi", 16, 4, num_blocks=1 + 12)
    driver = Driver(scheduler)
    requests = [make_request(0, 60, 1), make_request(1, 60, 1)]
    for request in requests:
        scheduler.add(request)
    steps = [list(driver.step().chunks) for _ in range(9)]
    assert steps == [["0"]] * 4 + [[]] + [["1"]] * 4  # the host hears of an end one step late


def test_each_preemption_asks_for_more_room_before_the_next_try() -> None:
    """Three outputs grow together into memory for two and a half; the last is preempted once, then waits for an end."""
    scheduler = make("sarathi", 64, 4, num_blocks=1 + 24)
    driver = Driver(scheduler)
    requests = [make_request(index, 10, 70) for index in range(3)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_unfinished():
        driver.step()
    assert [r.metrics.num_preemptions for r in requests] == [0, 0, 1]


def test_a_window_frees_blocks_before_anyone_is_preempted() -> None:
    """The second request's step across a block's end frees the very block that the first one needs."""
    scheduler = make("sarathi", 64, 2, num_blocks=1 + 3, window=2)
    driver = Driver(scheduler)
    first, second = make_request(0, 2, 40), make_request(1, 3, 40)
    scheduler.add(first), scheduler.add(second)
    while scheduler.has_unfinished():
        driver.step()
    assert first.metrics.num_preemptions == second.metrics.num_preemptions == 0


def test_a_chunk_schedule_shrinks_late_chunks() -> None:
    scheduler = make("sarathi", 40, 4, chunk_budgets=(40, 20, 8))
    driver = Driver(scheduler)
    scheduler.add(make_request(0, 90, 2))
    # The stages begin at tokens 0, 32 and 64.
    assert [num_prefill_tokens(driver.step()) for _ in range(6)] == [[40], [20], [20], [8], [2], []]


def test_reservation_counts_the_longest_request() -> None:
    """On demand, two short requests share what orca keeps for one."""
    for name, expected in (("hybrid_only", 2), ("orca", 1)):
        scheduler = make(name, 96, 4, num_blocks=1 + MAX_LEN // BLOCK_SIZE + 1)
        scheduler.add(make_request(0, 4, 4)), scheduler.add(make_request(1, 4, 4))
        assert len(scheduler.schedule().chunks) == expected
