"""Parallel compilation and the count of compilations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest

from jaxserve.engine.compile import CompileCounter, CompiledPrograms, compile_all, gpu_options


def test_compile_all() -> None:
    programs = compile_all(
        {n: partial(jax.jit(lambda x, n=n: x * n).lower, np.ones(n, np.float32)) for n in (2, 3, 5)},
        show_progress=False,
    )
    assert list(programs) == [2, 3, 5]
    for n, program in programs.items():
        np.testing.assert_array_equal(program(np.ones(n, np.float32)), np.full(n, n))


def test_options_that_the_environment_names_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's options would go before its flags, and gpu_check.py turn no graphs off."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    everything = gpu_options("cublaslt")
    assert everything["xla_gpu_enable_triton_gemm"] is False
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer= --xla_gpu_enable_triton_gemm=true")
    left = gpu_options("cublaslt")
    assert everything.keys() - left.keys() == {"xla_gpu_enable_command_buffer", "xla_gpu_enable_triton_gemm"}


def test_compile_all_passes_errors_on() -> None:
    with pytest.raises(TypeError, match="add got incompatible shapes"):
        compile_all(
            {"bad": partial(jax.jit(lambda x: x + np.ones(3)).lower, np.ones(2))},
            show_progress=False,
        )


def times(n: int, calls: list[int] | None = None, go_on: threading.Event | None = None) -> jax.stages.Lowered:
    """A program that multiplies ``n`` numbers by ``n``; notes that it was asked for, and waits for ``go_on``."""
    if calls is not None:
        calls.append(n)
    if go_on is not None:
        go_on.wait()
    return jax.jit(lambda x: x * n).lower(np.ones(n, np.float32))


def test_programs_ahead_in_the_background_and_on_demand(counter: CompileCounter) -> None:
    calls: list[int] = []
    go_on = threading.Event()
    programs = CompiledPrograms({n: partial(times, n, calls, go_on if n == 3 else None) for n in (2, 3, 5)})
    assert programs.wait(0), "nothing is being compiled"
    programs.compile([2], show_progress=False)
    programs.compile_in_background([3])
    assert not programs.wait(0)
    with counter:
        np.testing.assert_array_equal(programs[2](np.ones(2, np.float32)), [2, 2])
        go_on.set()
        np.testing.assert_array_equal(programs[3](np.ones(3, np.float32)), [3, 3, 3])
        assert counter.count == 0
        assert programs.wait(0)
        for _ in range(2):
            np.testing.assert_array_equal(programs[5](np.ones(5, np.float32)), np.full(5, 5))
        assert counter.count == 1
    assert calls == [2, 3, 5]
    programs.close()


def test_closing_programs_leaves_out_what_has_not_begun() -> None:
    calls: list[int] = []
    go_on = threading.Event()
    programs = CompiledPrograms({n: partial(times, n, calls, go_on) for n in (2, 3)})
    programs.compile_in_background([2, 3])
    threading.Timer(0.05, go_on.set).start()
    programs.close()
    assert 3 not in calls


def test_errors_in_the_background_reach_who_needs_the_program() -> None:
    def fail() -> jax.stages.Lowered:
        raise TypeError("no such program")

    programs = CompiledPrograms({1: fail})
    programs.compile_in_background([1])
    assert programs.wait(10)
    with pytest.raises(TypeError, match="no such program"):
        programs[1]
    programs.close()


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
