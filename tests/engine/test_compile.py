"""Token buckets, parallel compilation and the count of compilations."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.compile import SMALLEST_BUCKET, TILE, CompileCounter, compile_all, token_buckets


def bucket_of(num_tokens: int, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if bucket >= num_tokens)


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


def test_compile_all() -> None:
    programs = compile_all(
        {n: partial(jax.jit(lambda x, n=n: x * n).lower, np.ones(n, np.float32)) for n in (2, 3, 5)},
        show_progress=False,
    )
    assert list(programs) == [2, 3, 5]
    for n, program in programs.items():
        np.testing.assert_array_equal(program(np.ones(n, np.float32)), np.full(n, n))


def test_compile_all_passes_errors_on() -> None:
    with pytest.raises(TypeError, match="add got incompatible shapes"):
        compile_all(
            {"bad": partial(jax.jit(lambda x: x + np.ones(3)).lower, np.ones(2))},
            show_progress=False,
        )


@pytest.fixture
def counter() -> Iterator[CompileCounter]:
    counter = CompileCounter()
    yield counter
    counter.close()


def test_counter_counts_compilations_and_nothing_else(counter: CompileCounter) -> None:
    program, two, three, four = jax.jit(lambda x: x + 1), *(np.ones(n, np.float32) for n in (2, 3, 4))
    with counter:
        assert counter.count == 0
        program(two)
        assert counter.count == 1
        program(two)
        assert counter.count == 1, "a cached call"
        program(three)
        assert counter.count == 2, "a new shape"
        compiled = program.lower(four).compile()
        assert counter.count == 3, "compiled ahead of time"
        compiled(four)
        assert counter.count == 3


def test_counter_counts_inside_its_context_only(counter: CompileCounter) -> None:
    jax.jit(lambda x: x - 1)(np.ones(2, np.float32))
    with counter:
        pass
    jax.jit(lambda x: x - 2)(np.ones(2, np.float32))
    assert counter.count == 0


def test_counter_counts_its_own_thread_only(counter: CompileCounter) -> None:
    """Another engine of the process may be warming up meanwhile."""
    other = CompileCounter()

    def compile_in_a_thread() -> None:
        with other:
            jax.jit(lambda x: x - 3)(np.ones(2, np.float32))

    with counter:
        thread = threading.Thread(target=compile_in_a_thread)
        thread.start()
        thread.join()
    other.close()
    assert (counter.count, other.count) == (0, 1)
    with other:
        jax.jit(lambda x: x - 4)(np.ones(2, np.float32))
    assert other.count == 1, "closed"
