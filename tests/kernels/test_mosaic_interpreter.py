"""The interpreter of Mosaic kernels finds what races, though it compares fewer accesses than jax's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.kernels.mosaic_interpreter import interpreted

NUMBER, ROW, OTHER_ROW = (2, 5), (2, slice(64)), (3, slice(64))


def hand_over(written: Any, read: Any, *, waits: bool) -> jax.Array:
    """One warpgroup writes a part of shared memory, another reads one, waiting for the first before or afterwards."""
    shape = jnp.zeros((4, 64))[read].shape

    def body(out: Any, numbers: Any, done: Any) -> None:
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _() -> None:
            numbers[written] = jnp.ones_like(numbers[written])
            plgpu.barrier_arrive(done)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _() -> None:
            if waits:
                plgpu.barrier_wait(done)
            out[...] = numbers[read].reshape(out.shape)
            if not waits:
                plgpu.barrier_wait(done)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape or (1,), jnp.float32),
        scratch_types=[plgpu.SMEM((4, 64), jnp.float32), plgpu.Barrier()],
        num_threads=2,
        thread_name="warpgroup",
    )()


@pytest.mark.parametrize(("written", "read"), [(NUMBER, NUMBER), (NUMBER, ROW), (ROW, NUMBER), (ROW, ROW)])
def test_who_does_not_wait_races(written: Any, read: Any) -> None:
    with interpreted():
        hand_over(written, read, waits=True)
    with pytest.raises(AssertionError), interpreted():
        hand_over(written, read, waits=False)


def test_who_reads_something_else_does_not() -> None:
    with interpreted():
        hand_over(ROW, OTHER_ROW, waits=False)
        hand_over(NUMBER, (2, 6), waits=False)
