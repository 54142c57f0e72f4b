"""An engine without a model for scheduler tests, random workloads, and what every batch of every policy must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from jaxserve.request import FinishReason, Request, RequestMetrics, RequestStatus
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import POLICIES, Batch, Limits, Pace, Scheduler
from jaxserve.scheduler.blocks import BlockManager

MAX_LEN, BLOCK_SIZE = 96, 8
OUTPUT_TOKEN = 7
WINDOWS = st.one_of(st.none(), st.integers(1, 2 * BLOCK_SIZE), st.integers(1, MAX_LEN))


def make_request(index: int, prompt: int | list[int], output: int) -> Request:
    """``prompt``: its tokens, or how many."""
    return Request(
        request_id=str(index),
        prompt_token_ids=[1] * prompt if isinstance(prompt, int) else prompt,
        params=SamplingParams(max_tokens=output),
        max_tokens=output,
        metrics=RequestMetrics(arrival_seconds=float(index)),
    )


def block_table(blocks: BlockManager, slot: int) -> list[int]:
    """The sequence's blocks, in the order of its tokens; 0 where a window has left one behind."""
    return blocks.tables[slot, : blocks.held_tokens[slot] // BLOCK_SIZE].tolist()


class Driver:
    """An engine whose device notes where keys lie: samples arrive one step late, as in the overlapped loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.in_flight: Batch | None = None
        self._cache: dict[int, tuple[object, ...]] = {}
        """The key in each place, page * BLOCK_SIZE + offset."""
        self._swapped: dict[int, list[object]] = {}
        """The keys in each place of the swap space."""

    def step(self) -> Batch:
        computed = [(request, request.num_computed_tokens) for request in self.scheduler.running]
        batch = self.scheduler.schedule()
        self._copy()
        self._attend(batch, {place for request, stop in computed for place in self._places(request, stop)})
        previous, self.in_flight = self.in_flight, batch
        if previous is not None:
            self.process(previous)
        return batch

    def _copy(self) -> None:
        for block, place, is_out in self.scheduler.blocks.take_copies():
            keys = range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            if is_out:
                assert place < self.scheduler.limits.num_swap_blocks
                self._swapped[place] = [self._cache[key] for key in keys]
            else:
                self._cache.update(zip(keys, self._swapped[place], strict=True))

    def _attend(self, batch: Batch, held: set[int]) -> None:
        """As each layer does: write the keys of all rows, then read what each row sees. ``held``: the places of what
        running requests had computed before."""
        window = self.scheduler.limits.window or MAX_LEN
        written = set[int]()
        for chunk in batch.chunks.values():
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                place = self._place(chunk.request, position)
                assert place not in held, "nobody writes to what anyone may read"
                assert place not in written
                written.add(place)
                self._cache[place] = self._key(chunk.request, position)
        for chunk in batch.chunks.values():
            for position in range(max(0, chunk.start - window + 1), chunk.start + chunk.num_tokens):
                place = self._place(chunk.request, position)
                assert place >= BLOCK_SIZE, "not on the dummy page"
                assert self._cache[place] == self._key(chunk.request, position)

    def _places(self, request: Request, stop: int) -> list[int]:
        """Of the first tokens, as far as a running request has them still."""
        places = [self._place(request, position) for position in range(stop if request.slot >= 0 else 0)]
        return [place for place in places if place >= BLOCK_SIZE]

    def _key(self, request: Request, position: int) -> tuple[object, ...]:
        """Of all tokens up to there, where requests share them; of the request otherwise."""
        if not self.scheduler.limits.enable_prefix_caching:
            return request.request_id, position
        known = tuple(request.known_token_ids(0, position + 1))
        return request.params.cache_salt, *known, *[OUTPUT_TOKEN] * (position + 1 - len(known))

    def _place(self, request: Request, position: int) -> int:
        return (
            int(self.scheduler.blocks.tables[request.slot, position // BLOCK_SIZE] * BLOCK_SIZE) + position % BLOCK_SIZE
        )

    def process(self, batch: Batch) -> None:
        for chunk in batch.chunks.values():
            request = chunk.request
            if request.status is RequestStatus.FINISHED or not chunk.samples:
                continue
            request.output_token_ids.append(OUTPUT_TOKEN)
            if len(request.output_token_ids) >= request.max_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH)


def most_blocks(window: int | None, num_rows: int) -> int:
    """The blocks that a chunk of ``num_rows`` and the keys it sees can span."""
    if window is None:
        return MAX_LEN // BLOCK_SIZE
    # One token is the last of its block, the others fill blocks from there.
    return min(1 + -(-(window + num_rows - 2) // BLOCK_SIZE), MAX_LEN // BLOCK_SIZE)


@dataclass
class Workload:
    limits: Limits
    requests: list[Request]
    arrival_steps: list[int]
    """In order, of the requests."""
    aborts: list[bool]

    def scheduler(self, policy: str, *, chunk_budgets: Sequence[int] = (), pace: Pace | None = None) -> Scheduler:
        return POLICIES[policy](replace(self.limits, chunk_budgets=chunk_budgets, pace=pace))


@st.composite
def workloads(
    draw: st.DrawFn, *, whole_prompts: bool = False, windows: st.SearchStrategy[int | None] = WINDOWS
) -> Workload:
    """With ``whole_prompts``, the least budget and memory are those that whole prompts need."""
    max_num_seqs = draw(st.integers(1, 8))
    window = draw(windows)
    least_budget = MAX_LEN - 1 if whole_prompts else max_num_seqs
    least_blocks = MAX_LEN // BLOCK_SIZE if whole_prompts else most_blocks(window, num_rows=1)
    arrivals = draw(
        st.lists(
            st.tuples(st.integers(0, 12), st.integers(1, 64), st.integers(1, 32), st.booleans()),
            min_size=1,
            max_size=20,
        )
    )
    arrivals.sort(key=lambda arrival: arrival[0])
    return Workload(
        limits=Limits(
            token_budget=draw(st.integers(least_budget, least_budget + 40)),
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_LEN,
            # From barely one full-length request, or one window, to plenty.
            num_blocks=1 + least_blocks + draw(st.integers(0, 60)),
            block_size=BLOCK_SIZE,
            window=window,
        ),
        requests=[make_request(index, prompt, output) for index, (_, prompt, output, _) in enumerate(arrivals)],
        arrival_steps=[step for step, _, _, _ in arrivals],
        aborts=[aborts for _, _, _, aborts in arrivals],
    )


@dataclass
class Step:
    """A batch, and what its scheduler had before."""

    batch: Batch
    running: list[Request]
    decodes: list[Request]
    prefills: list[Request]

    @property
    def admitted(self) -> list[Request]:
        return [chunk.request for chunk in self.batch.chunks.values() if chunk.request not in self.running]


def run(scheduler: Scheduler, workload: Workload, driver: Driver | None = None) -> Iterator[Step]:
    """Serve the workload to its end; checks what holds for every policy."""
    most_preemptions = 1 + math.ceil(math.log2(MAX_LEN))
    driver, step, requests = driver or Driver(scheduler), 0, workload.requests
    pending = list(zip(workload.arrival_steps, requests, strict=True))
    while pending or scheduler.has_unfinished() or (driver.in_flight and driver.in_flight.chunks):
        while pending and pending[0][0] <= step:
            scheduler.add(pending.pop(0)[1])
        running = list(scheduler.running)
        unfinished = [r for r in running if not r.exhausted]
        decodes = [r for r in unfinished if r.decoding]
        prefills = [r for r in unfinished if not r.decoding]
        batch = driver.step()
        check_batch(scheduler, batch)
        taken = Step(batch, running, decodes, prefills)
        if batch.preempted:
            assert not taken.admitted, "there is no room, and what there is belongs to the preempted"
            assert not any(request.request_id in batch.chunks for request in batch.preempted)
        yield taken
        if step % 5 == 4:
            for aborts, request in zip(workload.aborts, requests, strict=True):
                if aborts and request.status is RequestStatus.RUNNING:
                    scheduler.finish(request, FinishReason.ABORT)
                    break
        step += 1
        # No request starves: everything ends within a bound that all the work, redone for each preemption, fits in.
        redone = sum(r.metrics.num_preemptions for r in requests)
        assert step < 200 + 100 * len(requests) + 100 * redone
    assert all(r.status is RequestStatus.FINISHED for r in requests)
    for request in requests:
        overtakers = [r for r in requests if int(r.request_id) > int(request.request_id) and r.rank < request.rank]
        overtaken = sum(1 + r.metrics.num_preemptions for r in overtakers)
        assert request.metrics.num_preemptions <= most_preemptions + overtaken
        if request.finish_reason is FinishReason.LENGTH:
            assert len(request.output_token_ids) == request.max_tokens
    scheduler.blocks.check()
    assert scheduler.blocks.num_used == 0


def check_batch(scheduler: Scheduler, batch: Batch) -> None:
    assert batch.num_tokens <= scheduler.limits.token_budget
    assert len(scheduler.running) <= scheduler.limits.max_num_seqs
    slots = [chunk.slot for chunk in batch.chunks.values()]
    assert len(set(slots)) == len(slots)
    for chunk in batch.chunks.values():
        assert chunk.num_tokens > 0
        # Behind drafts that hold a decode may be beyond an end that the host has seen by now.
        if chunk.request.status is not RequestStatus.FINISHED:
            assert scheduler.blocks.room(chunk.slot) >= chunk.start + chunk.num_tokens
    for request in scheduler.running:
        held = [block for block in block_table(scheduler.blocks, request.slot) if block]
        assert len(held) <= MAX_LEN // BLOCK_SIZE
    scheduler.blocks.check()
