"""Who begins as others did finds their blocks; nobody else does, and nobody loses a block for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import FinishReason, Request
from jaxserve.scheduler import POLICIES, Limits, Scheduler
from jaxserve.scheduler.swap_space import SwapSpace
from tests.scheduler.driver import (
    BLOCK_SIZE,
    MAX_LEN,
    WINDOWS,
    Driver,
    Workload,
    block_table,
    make_request,
    run,
    workloads,
)

LIMITS = Limits(
    token_budget=32,
    max_num_seqs=4,
    max_model_len=MAX_LEN,
    num_blocks=1 + 40,
    block_size=BLOCK_SIZE,
    enable_prefix_caching=True,
)


def make(policy: str = "sarathi", **limits: object) -> Scheduler:
    return POLICIES[policy](replace(LIMITS, **limits))  # type: ignore[arg-type]


def drain(driver: Driver) -> int:
    """Tokens computed until nobody has work."""
    computed = 0
    while driver.scheduler.has_unfinished():
        computed += driver.step().num_tokens
    driver.scheduler.blocks.check()
    assert driver.scheduler.blocks.num_used == 0
    return computed


def serve(driver: Driver, prompt: list[int], index: int, output: int = 1, **params: object) -> Request:
    request = make_request(index, prompt, output)
    request.params = replace(request.params, **params)  # type: ignore[arg-type]
    driver.scheduler.add(request)
    drain(driver)
    return request


@st.composite
def alike(draw: st.DrawFn, windows: st.SearchStrategy[int | None] = WINDOWS) -> Workload:
    """Requests of a few kinds, those of a kind with the same beginning, or with the same prompt at all."""
    workload = draw(workloads(windows=windows))
    beginnings = [[kind] * draw(st.integers(0, 60)) for kind in range(draw(st.integers(1, 3)))]
    requests = []
    for request in workload.requests:
        index, beginning = int(request.request_id), draw(st.sampled_from(beginnings))
        own = draw(st.lists(st.integers(0, 1), max_size=64 - len(beginning)))
        made = make_request(index, beginning + own or [0], request.max_tokens)
        salt, logprobs = draw(st.sampled_from([None, None, None, "salt"])), draw(st.sampled_from([None] * 5 + [1]))
        scored_from = 0 if logprobs is None else draw(st.integers(0, 70))
        made.params = replace(made.params, cache_salt=salt, prompt_logprobs=logprobs, logprob_start_len=scored_from)
        requests.append(made)
    return replace(workload, limits=replace(workload.limits, enable_prefix_caching=True), requests=requests)


@settings(max_examples=200, deadline=None)
@given(alike())
def test_everybody_reads_keys_of_its_own_tokens(workload: Workload) -> None:
    """The driver notes what is written where: nothing that is shared, and nothing that anyone still has to read."""
    scheduler = workload.scheduler("sarathi")
    for step in run(scheduler, workload):
        for request in step.admitted:
            start = step.batch.chunks[request.request_id].start
            assert start % BLOCK_SIZE == 0
            assert start < request.num_tokens
            scored = request.params.prompt_logprobs is not None
            assert start == 0 or not scored or start < request.params.logprob_start_len
    assert all(request.metrics.num_stalls == 0 for request in workload.requests)


@settings(max_examples=300, deadline=None)
@given(alike(st.none()), st.integers(1, 30), st.integers(1, 8))
def test_everybody_reads_keys_of_its_own_tokens_also_from_the_swap_space(
    workload: Workload, num_places: int, at_once: int
) -> None:
    limits = replace(workload.limits, num_swap_blocks=num_places, swap_blocks_at_once=at_once)
    scheduler = replace(workload, limits=limits).scheduler("sarathi")
    for _ in run(scheduler, workload):
        pass
    assert scheduler.blocks.swap_space is not None
    assert len(scheduler.blocks.swap_space) <= num_places
    assert all(request.metrics.num_stalls == 0 for request in workload.requests)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["chunked_only", "orca", "prefill_first", "hybrid_only"]), alike())
def test_under_every_policy(policy: str, workload: Workload) -> None:
    budget = max(workload.limits.token_budget, MAX_LEN)
    roomy = replace(workload.limits, token_budget=budget, num_blocks=workload.limits.num_blocks + MAX_LEN // BLOCK_SIZE)
    for _ in run(replace(workload, limits=roomy).scheduler(policy), workload):
        pass


@dataclass
class Sequence:
    request: Request
    num_tokens: int = 0
    """That it has blocks for."""


@settings(max_examples=300, deadline=None)
@given(WINDOWS, st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 2)), min_size=20, max_size=60))
def test_blocks_balance_whatever_is_shared(window: int | None, calls: list[tuple[int, int, int]]) -> None:
    """Against a model: which sequences have which blocks, and what tokens each block is of."""
    scheduler = make(num_blocks=1 + 20, window=window)
    blocks, sequences, contents = scheduler.blocks, dict[int, Sequence](), dict[int, tuple[int, ...]]()
    for slot, number, kind in calls:
        sequence = sequences.get(slot)
        if sequence is None:
            request = make_request(number, [kind] * (1 + number % 64) + [number] * 16, 16)
            hit = blocks.find(request)
            blocks.admit(slot, request, hit)
            sequences[slot] = Sequence(request, hit.num_tokens)
            request.num_computed_tokens = hit.num_tokens
            assert hit.num_tokens < request.num_tokens
            table = block_table(blocks, slot)
            first = 0 if window is None else max(0, hit.num_tokens - window + 1) // BLOCK_SIZE
            for index, block in enumerate(table):
                assert (block > 0) == (index >= first)
                if block:
                    assert contents[block] == tuple(request.known_token_ids(0, (index + 1) * BLOCK_SIZE))
        elif kind:
            stop = min(sequence.num_tokens + number % 24, sequence.request.num_tokens, blocks.room(slot))
            before = {block for other in sequences for block in block_table(blocks, other)}
            held = len(block_table(blocks, slot))
            blocks.grow(slot, stop)
            new = block_table(blocks, slot)[held:]
            assert not before.intersection(new), "nobody's block is given to another"
            for block in new:
                contents.pop(block, None)
            blocks.show(slot, stop)
            sequence.num_tokens = max(stop, sequence.num_tokens)
            sequence.request.num_computed_tokens = sequence.num_tokens
            for index, block in enumerate(block_table(blocks, slot)[: sequence.num_tokens // BLOCK_SIZE]):
                contents[block] = tuple(sequence.request.known_token_ids(0, (index + 1) * BLOCK_SIZE))
            if window is not None:
                blocks.release_before(slot, sequence.num_tokens - window + 1)
        else:
            blocks.release(slot)
            del sequences[slot]
        blocks.check()
    for slot in sequences:
        blocks.release(slot)
    blocks.check()
    assert blocks.num_used == 0


def test_a_second_prompt_computes_only_its_last_block() -> None:
    driver = Driver(make())
    prompt = list(range(64))
    assert serve(driver, prompt, 0).metrics.num_cached_tokens == 0
    again = make_request(1, prompt, 1)
    driver.scheduler.add(again)
    assert drain(driver) == BLOCK_SIZE
    assert again.metrics.num_cached_tokens == 64 - BLOCK_SIZE, "the last token gives the logits"
    assert serve(driver, [*prompt, 64], 2).metrics.num_cached_tokens == 64
    assert serve(driver, [*prompt[:20], 99, *prompt[21:]], 3).metrics.num_cached_tokens == 16


def test_a_chat_goes_on_where_it_was() -> None:
    """Outputs are found too, but for the last token, which nobody has computed."""
    driver = Driver(make())
    first = serve(driver, list(range(30)), 0, output=20)
    second = serve(driver, [*first.known_token_ids(0, 50), 1, 2, 3], 1)
    assert second.metrics.num_cached_tokens == 48


def test_requests_of_one_batch_share() -> None:
    driver = Driver(make())
    for index in range(3):
        driver.scheduler.add(make_request(index, [*range(16), 90 + index], 2))
    batch = driver.step()
    assert [(chunk.start, chunk.num_tokens) for chunk in batch.chunks.values()] == [(0, 17), (16, 1), (16, 1)]
    assert driver.scheduler.blocks.num_used == 2 + 3
    drain(driver)


def test_other_salts_find_nothing() -> None:
    driver = Driver(make())
    prompt = list(range(40))
    salts = [None, "a", "a", "b", None, "\ud800"]
    cached = [serve(driver, prompt, index, cache_salt=s).metrics.num_cached_tokens for index, s in enumerate(salts)]
    assert cached == [0, 0, 32, 0, 32, 0]


def test_who_scores_its_prompt_computes_all_of_it_for_others() -> None:
    driver = Driver(make())
    prompt = list(range(40))
    assert serve(driver, prompt, 0, prompt_logprobs=1).metrics.num_cached_tokens == 0
    assert serve(driver, prompt, 1, prompt_logprobs=1).metrics.num_cached_tokens == 0
    assert serve(driver, prompt, 2).metrics.num_cached_tokens == 32


@pytest.mark.parametrize(("scored_from", "num_cached"), [(1, 0), (8, 0), (9, 8), (24, 16), (25, 24), (99, 32)])
def test_who_scores_a_part_of_its_prompt_computes_that_part(scored_from: int, num_cached: int) -> None:
    """And the row before it, which predicts its first token."""
    driver = Driver(make())
    prompt = list(range(40))
    serve(driver, prompt, 0)
    scored = serve(driver, prompt, 1, prompt_logprobs=0, logprob_start_len=scored_from)
    assert scored.metrics.num_cached_tokens == num_cached


def test_a_preempted_request_finds_its_tokens_again() -> None:
    driver = Driver(make(token_budget=64, num_blocks=1 + 12))
    first, second = make_request(0, list(range(30)), 40), make_request(1, list(range(30, 60)), 40)
    driver.scheduler.add(first), driver.scheduler.add(second)
    computed = drain(driver)
    assert second.metrics.num_preemptions >= 1
    assert second.metrics.num_cached_tokens == 0, "of the prompt, as it came"
    assert computed < 2 * 69 + 30


def test_the_oldest_goes_first_and_tails_before_heads() -> None:
    driver = Driver(make(num_blocks=1 + 12))
    for index in range(2):
        serve(driver, [index] * 40, index)  # 5 blocks of each: 2 of 12 left
    serve(driver, [2] * 32, 2)  # takes these, and two blocks of the first
    found = [driver.scheduler.blocks.find(make_request(9, [index] * 48, 1)).num_tokens for index in range(3)]
    assert found == [24, 40, 32]


def test_a_window_needs_only_what_it_sees() -> None:
    scheduler = make(window=16, num_blocks=1 + 10)
    driver = Driver(scheduler)
    prompt = list(range(64))
    serve(driver, prompt, 0)
    assert scheduler.blocks.find(make_request(1, prompt, 1)).num_tokens == 56
    # What was left behind first has gone by now: blocks 0, 1 and 5, which the last two tokens of a longer hit see.
    serve(driver, [99] * 40, 2)
    hit = scheduler.blocks.find(make_request(3, prompt, 1))
    assert (hit.num_tokens, len(hit.blocks)) == (40, 2)
    request = make_request(4, prompt, 8)
    scheduler.add(request)
    driver.step()
    table = block_table(scheduler.blocks, request.slot)
    assert table[:3] == [0, 0, 0]
    assert table[3:5] == hit.blocks
    drain(driver)


def test_room_is_counted_for_what_is_new() -> None:
    """Two prompts of ten blocks fit into twelve where they share eight; without the cache one follows the other."""
    for enable_prefix_caching, expected in ((True, 2), (False, 1)):
        driver = Driver(make(enable_prefix_caching=enable_prefix_caching, num_blocks=1 + 13, token_budget=96))
        driver.scheduler.add(make_request(0, [*range(64), *[70] * 15], 8))
        driver.step()
        driver.scheduler.add(make_request(1, [*range(64), *[71] * 15], 8))
        driver.step()
        assert len(driver.scheduler.running) == expected
        drain(driver)


def test_aborts_leave_what_they_have_computed() -> None:
    driver = Driver(make(token_budget=24))
    request = make_request(0, list(range(80)), 1)
    driver.scheduler.add(request)
    driver.step(), driver.step()
    driver.scheduler.finish(request, FinishReason.ABORT)
    assert driver.scheduler.blocks.find(make_request(1, list(range(80)), 1)).num_tokens == 48


def test_no_cache_no_hits() -> None:
    for scheduler in (make(enable_prefix_caching=False), make("orca", token_budget=MAX_LEN)):
        driver = Driver(scheduler)
        assert [serve(driver, [1] * 40, index).metrics.num_cached_tokens for index in range(2)] == [0, 0]


def test_a_wrong_count_is_noticed() -> None:
    driver = Driver(make())
    for index in range(2):
        driver.scheduler.add(make_request(index, [*range(16), index], 4))
    driver.step()
    blocks = driver.scheduler.blocks
    blocks.tables[driver.scheduler.running[1].slot, 0] = 0
    with pytest.raises(RuntimeError, match="do not balance: 36 free \\+ 4 used of 40"):
        blocks.check()


def test_what_has_left_the_cache_comes_back_from_the_swap_space() -> None:
    """Both prompts fill the cache; the first one's blocks make room for the second's, and come back."""
    one, other = [1] * 64, [2] * 64
    driver = Driver(make(num_blocks=1 + 12, num_swap_blocks=12, swap_blocks_at_once=5))
    space = driver.scheduler.blocks.swap_space
    assert space is not None
    assert [serve(driver, prompt, i).metrics.num_cached_tokens for i, prompt in enumerate((one, other))] == [0, 0]
    assert len(space) == 4
    # Of its seven full blocks before the last token, three are in the cache and four in the swap space.
    assert serve(driver, one, 2).metrics.num_cached_tokens == 56
    # Its first three blocks have left the cache with all others but one, and five come back at once.
    assert serve(driver, other, 3).metrics.num_cached_tokens >= 40


def test_a_preempted_request_gets_its_own_back() -> None:
    driver = Driver(make(num_blocks=1 + 12, num_swap_blocks=30, swap_blocks_at_once=30, max_num_seqs=2))
    requests = [make_request(index, [index + 1] * 24, 60) for index in range(2)]
    for request in requests:
        driver.scheduler.add(request)
    computed = drain(driver)
    assert requests[1].metrics.num_preemptions
    # Without it everything of the preempted is computed again.
    again = Driver(make(num_blocks=1 + 12, max_num_seqs=2))
    for index in range(2):
        again.scheduler.add(make_request(index, [index + 1] * 24, 60))
    assert computed < drain(again)


def test_the_place_of_what_comes_back_is_not_given_away() -> None:
    """One place: what makes room for what comes back finds none."""
    space = SwapSpace(1, 1)
    space.put(b"a", 5)
    place = space.claim(b"a")
    space.put(b"b", 6)
    assert b"b" not in space
    space.copy_back(place, 7)
    space.put(b"c", 8)
    assert space.take_copies() == [(5, 0, True), (7, 0, False), (8, 0, True)]
    assert space.take_copies() == []
    space.put(b"c", 9)
    assert space.take_copies() == []
    space.put(b"d", 9)
    assert b"c" not in space
    assert b"d" in space
