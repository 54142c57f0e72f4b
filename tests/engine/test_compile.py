"""Parallel compilation and the count of compilations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest

from jaxserve.engine.compile import CompileCounter, compile_all


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
