"""Drafts by suffixes: what is proposed, who learns from whom, what is forgotten; outputs are those without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import DraftCounts
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.suffixes import LEAST_PROBABILITY, SuffixProposer
from jaxserve.request import Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from tests.engine.test_speculation import FLAT, GREEDY, logprobs_of, make_engine, outcome, prompts_of, serve

numbers = count()


def request_of(prompt: Sequence[int], output: Sequence[int] = (), salt: str | None = None) -> Request:
    params = SamplingParams(cache_salt=salt)
    return Request(str(next(numbers)), tuple(prompt), params, 100, RequestMetrics(0.0), output_token_ids=list(output))


def learn(proposer: SuffixProposer, prompt: Sequence[int], output: Sequence[int], salt: str | None = None) -> None:
    """From a request that has ended."""
    request = request_of(prompt, output, salt)
    proposer.propose(request, 1)
    proposer.discard(request)


def test_a_request_learns_from_itself_and_from_outputs() -> None:
    proposer = SuffixProposer(1000)
    assert proposer.propose(request_of([1, 2, 3, 9, 1, 2]), 15) == [3, 9, 1], "one more than agree"
    learn(proposer, [50, 51, 1, 2], [7, 8, 9, 10, 11, 12])
    assert proposer.propose(request_of([1, 2]), 15) == [7, 8, 9]
    assert proposer.propose(request_of([50, 51, 1, 2]), 15) == [7, 8, 9, 10, 11]
    assert proposer.propose(request_of([50, 51, 1, 2], [7]), 15) == [8, 9, 10, 11, 12]
    assert proposer.propose(request_of([50, 51, 1, 2], [7]), 2) == [8, 9]
    assert proposer.propose(request_of([50, 51]), 15) == [], "prompts of others tell nothing"
    assert proposer.propose(request_of([5]), 15) == []


def test_a_request_learns_from_those_under_way() -> None:
    proposer = SuffixProposer(1000)
    other = request_of([1, 2], [3])
    proposer.propose(other, 15)
    other.output_token_ids += [4, 5]
    proposer.propose(other, 15)
    assert proposer.propose(request_of([1, 2], [3]), 15) == [4, 5]


def test_what_most_go_on_with_comes() -> None:
    proposer = SuffixProposer(1000)
    for output in ([7, 8, 30], [7, 8, 31], [6, 5, 32]):
        learn(proposer, [1, 2, 3, 4], output)
    assert proposer.propose(request_of([1, 2, 3, 4]), 15)[:2] == [7, 8]
    for token_id in range(40, 40 + 30):
        learn(proposer, [11, 12], [token_id, 13, 14])
    assert proposer.propose(request_of([11, 12]), 15) == [], f"each is less likely than {LEAST_PROBABILITY}"


def test_salts_do_not_meet() -> None:
    proposer = SuffixProposer(1000)
    learn(proposer, [1, 2, 3], [4, 5, 6], "mine")
    assert proposer.propose(request_of([1, 2, 3]), 15) == []
    assert proposer.propose(request_of([1, 2, 3], salt="yours"), 15) == []
    assert proposer.propose(request_of([1, 2, 3], salt="mine"), 15) == [4, 5, 6]


def test_those_of_use_last_are_kept() -> None:
    proposer = SuffixProposer(23)
    for first in (10, 20, 30):
        learn(proposer, [first, first + 1], [first + 2, first + 3, first + 4, first + 5])
    assert proposer.propose(request_of([10, 11]), 15)
    learn(proposer, [40, 41], [42] * 10)
    assert proposer.num_cached_tokens == 6 + 12
    assert proposer.propose(request_of([10, 11]), 15) == [12, 13, 14]
    assert proposer.propose(request_of([20, 21]), 15) == proposer.propose(request_of([30, 31]), 15) == []


def test_memory_is_bounded() -> None:
    """Whatever the salts, nothing but what is kept is left of requests that have ended."""
    proposer, random = SuffixProposer(300), np.random.default_rng(0)
    for number in range(300):
        learn(proposer, *random.integers(0, 9, (2, 20)).tolist(), str(number % 50))
        assert proposer.num_cached_tokens <= 300
    assert not proposer._followed
    assert len(proposer._shared) <= len(proposer._kept) <= 300 / 40
    num_places = sum(len(places) for shared in proposer._shared.values() for places in shared._places.values())
    assert num_places <= 2 * 300


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=18), st.integers(1, 9))
def test_against_a_search_by_hand(text: list[int], most: int) -> None:
    agreeing: dict[int, list[int]] = {}
    for end in range(2, len(text)):
        number = 0
        while number < end and text[end - 1 - number] == text[-1 - number]:
            number += 1
        agreeing.setdefault(number, []).append(end)
    deepest = max(agreeing, default=0)
    expected: list[int] = []
    if deepest >= 2:
        ends, total = agreeing[deepest], len(agreeing[deepest])
        while len(expected) < min(most, deepest + 1):
            ahead = len(expected)
            going_on = [
                end for end in reversed(ends) if text[end : end + ahead] == expected and end + ahead < len(text)
            ]
            following = Counter(text[end + ahead] for end in going_on).most_common(1)
            if not following or following[0][1] < LEAST_PROBABILITY * total:
                break
            expected.append(following[0][0])
    assert SuffixProposer(100).propose(request_of(text or [1]), most) == expected


@pytest.fixture(scope="module")
def engines(tiny_tokenizer: Path) -> Iterator[tuple[Engine, Engine]]:
    """Without drafts, and with those of suffixes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Profiler, "draft_times", lambda _: FLAT)
        made = [make_engine("yi_gqa", tiny_tokenizer, speculative=name) for name in ("off", "suffix")]
        yield made[0], made[1]
        for engine in made:
            engine.close()


def test_outputs_are_those_without_drafts(engines: tuple[Engine, Engine]) -> None:
    """A second time they come out of drafts that nearly all hold, but not under another salt; neither changes any."""
    plain, speculating = engines
    sampled = replace(GREEDY, temperature=0.8, top_p=0.9, seed=5, logprobs=1)
    params = [sampled, GREEDY, replace(sampled, repetition_penalty=1.2), replace(GREEDY, bad_words=["<9>", "<8> <7>"])]
    prompts = prompts_of(7, 6)
    want = serve(plain, prompts, *params)

    def acceptance(*asked: SamplingParams) -> tuple[float, float]:
        """And the share of the output that came as drafts."""
        drafts = DraftCounts()
        speculating.on_step.append(lambda step, _: drafts.merge(step.drafts))
        got = serve(speculating, prompts, *asked)
        speculating.on_step.pop()
        assert list(map(outcome, got)) == list(map(outcome, want))
        assert logprobs_of(got) == pytest.approx(logprobs_of(want), abs=1e-4)
        return drafts.acceptance, drafts.num_held / sum(len(one.token_ids) for one in got)

    rate, share = acceptance(*params)
    again, share_again = acceptance(*params)
    salted, share_salted = acceptance(*(replace(one, cache_salt="mine") for one in params))
    assert again > 0.95
    assert share_again > 0.6
    assert (share_salted, salted) < (share_again, again)
    assert salted == pytest.approx(rate, abs=0.2)
    assert share_salted == pytest.approx(share, abs=0.2)
