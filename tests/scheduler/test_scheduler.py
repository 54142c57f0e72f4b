"""The properties that define stall-free batching, over random arrivals, stops and aborts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.blocks import BlockManager
from jaxserve.request import FinishReason, Request, RequestMetrics, RequestStatus, SamplingParams
from jaxserve.scheduler import Batch, Scheduler, make_scheduler

MAX_LEN, BLOCK_SIZE = 96, 8


def make_request(index: int, prompt: int, output: int) -> Request:
    return Request(
        request_id=str(index),
        prompt_token_ids=[1] * prompt,
        params=SamplingParams(max_tokens=output),
        max_tokens=output,
        metrics=RequestMetrics(arrival_seconds=float(index)),
    )


class Driver:
    """An engine whose device notes where keys lie: samples arrive one step late, as in the overlapped loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.in_flight: Batch | None = None
        self._cache: dict[int, tuple[str, int]] = {}
        """Request and position of the key in each place, page * BLOCK_SIZE + offset."""

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self._attend(batch)
        previous, self.in_flight = self.in_flight, batch
        if previous is not None:
            self.process(previous)
        return batch

    def _attend(self, batch: Batch) -> None:
        """As each layer does: write the keys of all rows, then read what each row sees."""
        window = self.scheduler.window or MAX_LEN
        for chunk in batch.chunks.values():
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self._cache[self._place(chunk.request, position)] = (chunk.request.request_id, position)
        for chunk in batch.chunks.values():
            for position in range(max(0, chunk.start - window + 1), chunk.start + chunk.num_tokens):
                place = self._place(chunk.request, position)
                assert place >= BLOCK_SIZE, "not on the dummy page"
                assert self._cache[place] == (chunk.request.request_id, position)

    def _place(self, request: Request, position: int) -> int:
        return self.scheduler.blocks.table(request.request_id)[position // BLOCK_SIZE] * BLOCK_SIZE + (
            position % BLOCK_SIZE
        )

    def process(self, batch: Batch) -> None:
        for chunk in batch.chunks.values():
            request = chunk.request
            if request.status is RequestStatus.FINISHED or not chunk.samples:
                continue
            request.num_pending_tokens -= 1
            request.output_token_ids.append(7)
            if len(request.output_token_ids) >= request.max_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH)


def most_blocks(window: int | None, num_rows: int) -> int:
    """The blocks that a chunk of ``num_rows`` and the keys it sees can span."""
    if window is None:
        return MAX_LEN // BLOCK_SIZE
    # One token is the last of its block, the others fill blocks from there.
    return min(1 + -(-(window + num_rows - 2) // BLOCK_SIZE), MAX_LEN // BLOCK_SIZE)


@st.composite
def workloads(draw: st.DrawFn) -> dict:
    max_num_seqs = draw(st.integers(1, 8))
    window = draw(st.one_of(st.none(), st.integers(1, 2 * BLOCK_SIZE), st.integers(1, MAX_LEN)))
    return {
        "window": window,
        "token_budget": draw(st.integers(max_num_seqs, 48)),
        "max_num_seqs": max_num_seqs,
        # From barely one full-length request, or one window, to plenty.
        "num_blocks": 1 + most_blocks(window, num_rows=1) + draw(st.integers(0, 60)),
        "requests": draw(
            st.lists(
                st.tuples(st.integers(0, 12), st.integers(1, 64), st.integers(1, 32), st.booleans()),
                min_size=1,
                max_size=20,
            )
        ),
    }


def check_batch(scheduler: Scheduler, batch: Batch, decodes: list[Request]) -> None:
    assert batch.num_tokens <= scheduler.token_budget
    assert len(scheduler.running) <= scheduler.max_num_seqs
    slots = [chunk.slot for chunk in batch.chunks.values()]
    assert len(set(slots)) == len(slots)
    for chunk in batch.chunks.values():
        assert chunk.num_tokens > 0
        assert scheduler.blocks.room(chunk.request.request_id) >= chunk.start + chunk.num_tokens
    for request in scheduler.running:
        held = [block for block in scheduler.blocks.table(request.request_id) if block]
        assert len(held) <= most_blocks(scheduler.window, scheduler.token_budget)
    for request in decodes:
        assert request.request_id in batch.chunks or request in batch.preempted
    scheduler.blocks.check()


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_stall_free_batching(workload: dict) -> None:
    blocks = BlockManager(workload["num_blocks"], BLOCK_SIZE)
    scheduler = make_scheduler(
        "sarathi", token_budget=workload["token_budget"], max_num_seqs=workload["max_num_seqs"], blocks=blocks,
        window=workload["window"],
    )  # fmt: skip
    driver, step = Driver(scheduler), 0
    arrivals = sorted(workload["requests"], key=lambda r: r[0])
    requests = [make_request(i, prompt, output) for i, (_, prompt, output, _) in enumerate(arrivals)]
    pending = list(zip(arrivals, requests, strict=True))
    while pending or scheduler.has_unfinished() or (driver.in_flight and driver.in_flight.chunks):
        while pending and pending[0][0][0] <= step:
            scheduler.add(pending.pop(0)[1])
        decodes = [r for r in scheduler.running if r.decoding and not r.exhausted]
        check_batch(scheduler, driver.step(), decodes)
        if step % 5 == 4:
            for (_, _, _, aborts), request in zip(arrivals, requests, strict=True):
                if aborts and request.status is RequestStatus.RUNNING:
                    scheduler.finish(request, FinishReason.ABORT)
                    break
        step += 1
        # No request starves: everything ends within a bound that all the work, redone for each preemption, fits in.
        redone = sum(r.metrics.num_preemptions for r in requests)
        assert step < 200 + 100 * len(requests) + 100 * redone
    assert all(r.status is RequestStatus.FINISHED for r in requests)
    assert all(r.metrics.num_stalls == 0 for r in requests)
    for request in requests:
        if request.finish_reason is FinishReason.LENGTH:
            assert len(request.output_token_ids) == request.max_tokens
    blocks.check()
    assert blocks.num_used == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8))
def test_first_come_first_served(prompts: list[int]) -> None:
    """Without memory pressure, requests start, and get their first token, in order of arrival."""
    scheduler = make_scheduler("sarathi", token_budget=32, max_num_seqs=4, blocks=BlockManager(500, BLOCK_SIZE))
    driver, started = Driver(scheduler), []
    for index, prompt in enumerate(prompts):
        scheduler.add(make_request(index, prompt, 3))
    while scheduler.has_unfinished():
        started += [c.request.request_id for c in driver.step().chunks.values() if c.start == 0]
    assert started == [str(i) for i in range(len(prompts))]


def test_long_prompt_does_not_stall_decodes_and_fills_the_budget() -> None:
    scheduler = make_scheduler("sarathi", token_budget=32, max_num_seqs=8, blocks=BlockManager(500, BLOCK_SIZE))
    driver = Driver(scheduler)
    for index in range(4):
        scheduler.add(make_request(index, 4, 64))
    driver.step(), driver.step()
    scheduler.add(make_request(9, 90, 2))
    for expected in (28, 28, 28, 6):
        batch = driver.step()
        assert [c.num_tokens for c in batch.chunks.values()] == [1, 1, 1, 1, expected]


def test_prefill_first_stalls_running_decodes() -> None:
    scheduler = make_scheduler("prefill_first", token_budget=96, max_num_seqs=8, blocks=BlockManager(500, BLOCK_SIZE))
    driver = Driver(scheduler)
    request = make_request(0, 4, 64)
    scheduler.add(request)
    driver.step(), driver.step()
    scheduler.add(make_request(1, 90, 2))
    assert list(driver.step().chunks) == ["1"]
    assert request.metrics.num_stalls == 1


def test_latest_arrival_is_preempted_and_recomputed() -> None:
    blocks = BlockManager(1 + 12, BLOCK_SIZE)
    scheduler = make_scheduler("sarathi", token_budget=64, max_num_seqs=4, blocks=blocks)
    driver = Driver(scheduler)
    first, second = make_request(0, 30, 40), make_request(1, 30, 40)
    scheduler.add(first), scheduler.add(second)
    while scheduler.has_unfinished():
        driver.step()
    assert first.metrics.num_preemptions == 0
    assert second.metrics.num_preemptions >= 1
    assert len(second.output_token_ids) == 40


def test_a_window_frees_blocks_before_anyone_is_preempted() -> None:
    """The second request's step across a block's end frees the very block that the first one needs."""
    blocks = BlockManager(1 + 3, BLOCK_SIZE)
    scheduler = make_scheduler("sarathi", token_budget=64, max_num_seqs=2, blocks=blocks, window=2)
    driver = Driver(scheduler)
    first, second = make_request(0, 2, 40), make_request(1, 3, 40)
    scheduler.add(first), scheduler.add(second)
    while scheduler.has_unfinished():
        driver.step()
    assert first.metrics.num_preemptions == second.metrics.num_preemptions == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["grow", "release_before", "release"]), st.sampled_from("abc"), st.integers(-9, 90))
    )
)
def test_blocks_balance_whatever_is_taken_and_given_back(calls: list[tuple[str, str, int]]) -> None:
    blocks = BlockManager(20, BLOCK_SIZE)
    tables: dict[str, list[int]] = {}
    for name, request_id, num_tokens in calls:
        table = tables.setdefault(request_id, [])
        if name == "grow":
            if num_tokens > blocks.room(request_id):
                continue
            blocks.grow(request_id, num_tokens)
            added = blocks.table(request_id)[len(table) :]
            assert len(added) == max(0, -(-num_tokens // BLOCK_SIZE) - len(table))
            assert all(added)
            table += added
        elif name == "release_before":
            blocks.release_before(request_id, num_tokens)
            below = [(index + 1) * BLOCK_SIZE <= num_tokens for index in range(len(table))]
            table[:] = [0 if gone else block for gone, block in zip(below, table, strict=True)]
        else:
            blocks.release(request_id)
            table.clear()
        blocks.check()
        num_used = sum(block > 0 for table in tables.values() for block in table)
        assert blocks.num_used == num_used
        for other, expected in tables.items():
            assert blocks.table(other) == expected
            assert blocks.room(other) == (len(expected) + 19 - num_used) * BLOCK_SIZE


def test_blocks_notice_a_lost_block() -> None:
    blocks = BlockManager(10, BLOCK_SIZE)
    blocks.grow("a", 20)
    blocks.check()
    blocks.table("a").pop()
    with pytest.raises(RuntimeError, match="do not balance: 6 free \\+ 2 used of 9"):
        blocks.check()
