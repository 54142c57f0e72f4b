"""Drafts take what the budget leaves, the likeliest first, as long as they pay; nothing is taken from anybody."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import Request, RequestStatus
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import POLICIES, Batch, Limits, Pace, Speculation
from jaxserve.scheduler.step_time import StepTimeModel
from tests.scheduler.driver import MAX_LEN, Driver, Workload, make_request, run, workloads

FLAT = StepTimeModel({1: 1.0, 64: 1.0}, 0.0, 0.0)
LIMITS = Limits(token_budget=16, max_num_seqs=4, max_model_len=MAX_LEN, num_blocks=100, block_size=8)


class DraftDriver(Driver):
    """Of each decode's drafts a random number holds."""

    def __init__(self, workload: Workload, policy: str, speculation: Speculation, seed: int) -> None:
        super().__init__(POLICIES[policy](replace(workload.limits, speculation=speculation)))
        self._random = np.random.default_rng(seed)

    def _attend(self, batch: Batch, held: set[int]) -> None:
        """Only the device knows where the rows are."""

    def process(self, batch: Batch) -> None:
        for chunk in batch.chunks.values():
            request = chunk.request
            if request.status is not RequestStatus.FINISHED:
                num_held = int(self._random.integers(chunk.num_drafts + 1))
                self.scheduler.verified(chunk, chunk.num_drafts, num_held)
                request.output_token_ids += [7] * min(
                    num_held, max(0, request.max_tokens - 1 - len(request.output_token_ids))
                )
        super().process(batch)


@settings(deadline=None)
@given(workloads(), st.integers(1, 9), st.integers(0, 20), st.sampled_from(["sarathi", "chunked_only"]), st.integers(0))
def test_the_budget_holds_and_all_end(
    workload: Workload, num_speculative_tokens: int, max_drafts: int, policy: str, seed: int
) -> None:
    speculation = Speculation(num_speculative_tokens=num_speculative_tokens, max_drafts=max_drafts)
    driver = DraftDriver(workload, policy, speculation, seed)
    for step in run(driver.scheduler, workload, driver):
        chunks = step.batch.chunks.values()
        assert sum(chunk.num_tokens for chunk in chunks) == step.batch.num_tokens
        assert sum(chunk.num_drafts for chunk in chunks) <= max_drafts
        for chunk in chunks:
            assert chunk.num_drafts <= num_speculative_tokens
            assert not chunk.num_drafts or chunk.start >= chunk.request.num_prompt_tokens
            assert chunk.start + chunk.num_tokens <= chunk.request.num_prompt_tokens + chunk.request.max_tokens


def granted(pace: Pace | None, rates: list[tuple[float, float]], *, output: int = 60, **limits: int) -> list[int]:
    """Drafts of requests that decode, of whose earlier ones so many held of so many."""
    speculation = Speculation(num_speculative_tokens=5, max_drafts=limits.pop("max_drafts", 12), pace=pace)
    driver = Driver(POLICIES["sarathi"](replace(LIMITS, speculation=speculation, **limits)))
    requests = [make_request(index, 3, output) for index in range(len(rates))]
    for request in requests:
        driver.scheduler.add(request)
    first = driver.scheduler.schedule()
    driver.process(first)
    for request, (num_held, num_tried) in zip(requests, rates, strict=True):
        request.acceptance.num_held, request.acceptance.num_tried = num_held, num_tried
    return drafts_of(driver.scheduler.schedule(), requests)


def drafts_of(batch: Batch, requests: list[Request]) -> list[int]:
    return [batch.chunks[request.request_id].num_drafts for request in requests]


def test_rows_that_cost_nothing_are_all_taken() -> None:
    assert granted(Pace(math.inf, FLAT), [(9, 9)]) == [5]
    assert granted(None, [(9, 9), (0, 9)]) == [5, 5]
    assert granted(None, [(9, 9), (0, 9)], max_drafts=6) == [5, 1]
    assert granted(None, [(9, 9), (0, 9)], token_budget=9) == [5, 2]


def test_the_likeliest_come_first() -> None:
    """Of 0.95, 0.5 and 0.05: five of the first are above all of the second."""
    assert granted(None, [(0, 9), (9, 9), (4.5, 9)], max_drafts=7) == [0, 5, 2]


def test_drafts_end_where_they_do_not_pay() -> None:
    """Two tokens in 2 + 1 seconds; each further row takes 0.3 s and must gain as many tokens per second."""
    rising = StepTimeModel({1: 1.3, 2: 1.6, 64: 1.6 + 62 * 0.3}, 0.0, 0.0, interpolates=True)
    assert granted(Pace(math.inf, rising), [(0, 9), (0, 9)]) == [0, 0]
    assert granted(Pace(math.inf, rising), [(9, 9), (0, 9)]) == [5, 0]
    assert granted(Pace(2.3, rising), [(9, 9), (0, 9)]) == [2, 0]


def test_blocks_that_others_may_need_are_left_alone() -> None:
    """Prompts of three tokens have a block of eight: there is room for three drafts and the token behind them."""
    assert granted(None, [(9, 9), (9, 9)], num_blocks=1 + 12) == [5, 5]
    assert granted(None, [(9, 9), (9, 9)], num_blocks=1 + 4, max_model_len=32, output=20) == [3, 3]


def test_nobody_guesses_behind_the_end() -> None:
    assert granted(None, [(9, 9)], output=4) == [2]
    assert granted(None, [(9, 9)], output=2) == [0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(max_tokens=50), 5),
        (SamplingParams(max_tokens=50, num_speculative_tokens=0), 0),
        (SamplingParams(max_tokens=50, num_speculative_tokens=2), 2),
        (SamplingParams(max_tokens=50, bad_words=["no"]), 0),
        (SamplingParams(max_tokens=50, min_tokens=2), 0),
        (SamplingParams(max_tokens=50, min_tokens=1), 5),
        (SamplingParams(max_tokens=50, repetition_penalty=1.5), 5),
        (SamplingParams(max_tokens=50, structured_outputs={"choice": ["a"]}), 0),
    ],
    ids=str,
)
def test_who_gets_none(params: SamplingParams, expected: int) -> None:
    driver = Driver(
        POLICIES["sarathi"](replace(LIMITS, speculation=Speculation(num_speculative_tokens=5, max_drafts=9)))
    )
    request = make_request(0, 3, 50)
    request.params = params
    driver.scheduler.add(request)
    driver.process(driver.scheduler.schedule())
    assert drafts_of(driver.scheduler.schedule(), [request]) == [expected]


def test_a_request_without_drafts_is_tried_again() -> None:
    request = make_request(0, 3, 50)
    for _ in range(20):
        request.acceptance.note(5, 0)
    assert request.acceptance.rate < 0.1
    for _ in range(30):
        request.acceptance.fade()
    assert request.acceptance.rate > 0.4
