"""Lower priorities first, the latest preempted first, and everybody served."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import Request
from jaxserve.scheduler import POLICIES, Limits, Scheduler
from jaxserve.scheduler.chunked import fair_shares
from jaxserve.scheduler.queue import AGEING_SECONDS, WaitingQueue
from tests.scheduler.driver import BLOCK_SIZE, MAX_LEN, Driver, Workload, make_request, run
from tests.scheduler.test_prefix_cache import alike


def ask(
    index: int, priority: int = 0, arrival_seconds: float = 0.0, prompt: int = 8, output: int = 2, client: str = ""
) -> Request:
    request = make_request(index, prompt, output)
    request.client = client
    request.params = replace(request.params, priority=priority)
    request.metrics.arrival_seconds = arrival_seconds
    return request


def make(max_num_seqs: int = 1, num_blocks: int = 100) -> Scheduler:
    return POLICIES["sarathi"](
        Limits(
            token_budget=32,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_LEN,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
        )
    )


def order(scheduler: Scheduler, *requests: Request) -> list[str]:
    """In which requests that wait together begin, where one runs at a time."""
    driver, begun = Driver(scheduler), list[str]()
    for request in requests:
        scheduler.add(request)
    while scheduler.has_unfinished():
        begun += [name for name, chunk in driver.step().chunks.items() if chunk.start == 0]
    return begun


@st.composite
def urgent(draw: st.DrawFn) -> Workload:
    """Of several priorities, and with beginnings that some share. A request's number is the second of its arrival."""
    workload, priorities = draw(alike()), st.sampled_from([-1, 0, 0, 0, 1, 100])
    for request in workload.requests:
        request.params = replace(request.params, priority=draw(priorities))
    return workload


@settings(max_examples=200, deadline=None)
@given(urgent())
def test_the_earliest_rank_is_admitted_and_the_latest_preempted(workload: Workload) -> None:
    """The run also proves that everybody is served, and preempted only so often."""
    scheduler = workload.scheduler("sarathi")
    for step in run(scheduler, workload):
        ranks = [request.rank for request in scheduler.running]
        assert ranks == sorted(ranks)
        head = scheduler.waiting.head()
        if step.admitted and head is not None:
            assert max(request.rank for request in step.admitted) < head.rank
        if step.batch.preempted and ranks:
            assert min(request.rank for request in step.batch.preempted) > ranks[-1]
    assert all(request.metrics.num_stalls == 0 for request in workload.requests)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["chunked_only", "hybrid_only", "prefill_first", "orca", "decode_first"]), urgent())
def test_everybody_is_served_under_every_policy(policy: str, workload: Workload) -> None:
    budget = max(workload.limits.token_budget, MAX_LEN)
    roomy = replace(workload.limits, token_budget=budget, num_blocks=workload.limits.num_blocks + MAX_LEN // BLOCK_SIZE)
    for _ in run(replace(workload, limits=roomy).scheduler(policy), workload):
        pass


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 40)), min_size=1, max_size=12), st.floats(0, 1000))
def test_the_order_is_that_of_priorities_that_fall_while_waiting(asked: list[tuple[int, float]], now: float) -> None:
    """Whenever one looks; within what floats can tell apart."""
    queue, requests = WaitingQueue(), list[Request]()
    for index, (priority, seconds) in enumerate(sorted(asked, key=lambda one: one[1])):
        requests.append(ask(index, priority, seconds))
        queue.add(requests[-1])

    def aged(request: Request) -> float:
        return request.params.priority - (now - request.metrics.arrival_seconds) / AGEING_SECONDS

    while (head := queue.head()) is not None:
        assert aged(head) <= min(map(aged, requests)) + 1e-9
        queue.remove(head)
        requests.remove(head)
    assert not requests
    assert len(queue) == 0


def test_urgent_requests_overtake() -> None:
    requests = [ask(0, 1), ask(1, 0), ask(2, -2), ask(3, 0), ask(4, 1)]
    assert order(make(), *requests) == ["2", "1", "3", "0", "4"]


@pytest.mark.parametrize(("seconds", "expected"), [(9.0, ["1", "0"]), (11.0, ["0", "1"])])
def test_ten_seconds_of_waiting_are_worth_a_level(seconds: float, expected: list[str]) -> None:
    assert order(make(), ask(0, 1, arrival_seconds=0.0), ask(1, 0, arrival_seconds=seconds)) == expected


def test_who_is_added_late_goes_behind() -> None:
    """However early it came; of equal priority the order is that of the queue."""
    assert order(make(), ask(0, 0, arrival_seconds=5.0), ask(1, 0, arrival_seconds=1.0)) == ["0", "1"]


def test_clients_take_turns() -> None:
    """One's long prompts do not hold up another's, whoever was first; each one's own stay in order."""
    flood = [ask(i, prompt=40, client="a") for i in range(4)]
    assert order(make(), *flood, ask(4, client="b"), ask(5, client="b")) == ["0", "4", "5", "1", "2", "3"]
    flood = [ask(i, prompt=40, client="a") for i in range(4)]
    assert order(make(), *flood, ask(4), ask(5)) == ["0", "4", "5", "1", "2", "3"], "as does who has no name"
    nameless = [ask(i, prompt=40) for i in range(4)]
    assert order(make(), *nameless, ask(4, client="b")) == ["0", "1", "2", "3", "4"], "the nameless are one crowd"


def test_a_short_prompt_does_not_wait_for_another_clients_long_one() -> None:
    """The budget of 32 is shared as soon as it comes, and goes to the long one alone where nobody else wants it."""
    driver = Driver(make(max_num_seqs=4))
    driver.scheduler.add(ask(0, prompt=90, client="a"))
    assert {name: c.num_tokens for name, c in driver.step().chunks.items()} == {"0": 32}
    driver.scheduler.add(ask(1, prompt=30, client="a"))
    driver.scheduler.add(ask(2, prompt=10, client="b"))
    assert {name: c.num_tokens for name, c in driver.step().chunks.items()} == {"0": 22, "2": 10}
    driver.scheduler.add(ask(3, prompt=40, client="c"))
    # A decode of b's first; then halves for a, which has the rest of the long prompt, and c.
    assert {name: c.num_tokens for name, c in driver.step().chunks.items()} == {"0": 16, "2": 1, "3": 15}


@given(st.integers(0, 50), st.dictionaries(st.text(max_size=2), st.integers(1, 40), min_size=1, max_size=6))
def test_shares_are_as_even_as_claims_allow(budget: int, claims: dict[str, int]) -> None:
    shares = fair_shares(budget, claims)
    assert sum(shares.values()) == min(budget, sum(claims.values()))
    assert all(shares[client] <= claim for client, claim in claims.items())
    unmet = [shares[client] for client, claim in claims.items() if shares[client] < claim]
    assert not unmet or max(shares.values()) - min(unmet) <= 1


def test_nobody_waits_for_turns_that_never_end() -> None:
    """A client's requests have the ranks of its own pace, which later ones of others do not precede for ever."""
    queue, late = WaitingQueue(), [ask(i, arrival_seconds=i * 0.01, prompt=10, client="b") for i in range(20)]
    for request in (ask(90, prompt=100, client="a"), ask(91, prompt=100, client="a"), *late):
        queue.add(request)
    names = []
    while (head := queue.head()) is not None:
        names.append(head.request_id)
        queue.remove(head)
    assert names.index("91") == 11, "0.1 s behind the first, as ten of the others"


@settings(max_examples=100, deadline=None)
@given(urgent(), st.data())
def test_everybody_is_served_among_clients(workload: Workload, data: st.DataObject) -> None:
    for request in workload.requests:
        request.client = data.draw(st.sampled_from(["", "a", "b"]))
    for step in run(workload.scheduler("sarathi"), workload):
        assert step.batch.num_tokens <= workload.limits.token_budget
    assert all(request.metrics.num_stalls == 0 for request in workload.requests)


def test_the_least_urgent_is_preempted() -> None:
    """Although it came first; and it does not come back before the other has ended."""
    scheduler = make(max_num_seqs=4, num_blocks=1 + 12)
    driver = Driver(scheduler)
    patient, urgent = ask(0, 1, prompt=30, output=40), ask(1, 0, prompt=30, output=40)
    scheduler.add(patient)
    driver.step()
    scheduler.add(urgent)
    while scheduler.has_unfinished():
        driver.step()
    assert urgent.metrics.num_preemptions == 0
    assert patient.metrics.num_preemptions >= 1
    assert len(patient.output_token_ids) == 40
