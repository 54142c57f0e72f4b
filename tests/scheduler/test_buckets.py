"""Token buckets waste little and are few."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.buckets import SMALLEST_BUCKET, TILE, bubble_share, bucket_of, token_buckets


@pytest.mark.parametrize(
    ("budget", "buckets"),
    [
        (1, (1,)),
        (16, (16,)),
        (17, (16, 17)),
        (256, (16, 32, 64, 128, 256)),
        (500, (16, 32, 64, 128, 256, 384, 500)),
        (512, (16, 32, 64, 128, 256, 384, 512)),
    ],
)
def test_buckets(budget: int, buckets: tuple[int, ...]) -> None:
    assert token_buckets(budget) == buckets


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16_384))
def test_bucket_properties(budget: int) -> None:
    buckets = token_buckets(budget)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == budget, "no step exceeds the budget, and none is too large for its program"
    for bucket in buckets[:-1]:
        assert bucket % TILE == 0 or (bucket < TILE and bucket.bit_count() == 1 and bucket >= SMALLEST_BUCKET)
    for smaller, larger in itertools.pairwise(buckets):
        # The worst step is one token more than the smaller bucket holds.
        assert larger <= 2 * (smaller + 1)
        if smaller >= TILE:
            assert larger - smaller <= max(TILE, smaller / 8)
    assert len(buckets) <= 40


@settings(max_examples=200, deadline=None)
@given(st.integers(SMALLEST_BUCKET, 4096), st.data())
def test_padding_is_never_more_than_the_tokens(budget: int, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(SMALLEST_BUCKET, budget))
    assert bucket_of(num_tokens, token_buckets(budget)) <= 2 * num_tokens


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4096), st.data())
def test_a_bucket_is_a_budget_with_the_smaller_buckets(budget: int, data: st.DataObject) -> None:
    """So programs compiled for a budget serve any smaller one that is among its buckets."""
    buckets = token_buckets(budget)
    index = data.draw(st.integers(0, len(buckets) - 1))
    assert token_buckets(buckets[index]) == buckets[: index + 1]


def test_bubbles_are_rows_without_a_token() -> None:
    assert bubble_share([128, 128], 128) == 0
    assert bubble_share([96, 0], 128) == 1 - 96 / 256
