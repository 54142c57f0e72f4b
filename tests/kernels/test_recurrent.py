"""Recurrent layers over batches of any chunks, against the recurrence token by token in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kernels import native
from jaxserve.kernels.backend import CPU_TILING, Target
from jaxserve.kernels.cache import RecurrentShape, RecurrentState
from jaxserve.kernels.cpu_attention import Native
from jaxserve.kernels.recurrent import RuleRows, RunRows, convolve, recur, run_rows, segments_of
from jaxserve.sharding.mesh import make_mesh

ROWS, SLOTS, LENGTH = 96, 3, 180
SHAPE = RecurrentShape(2, SLOTS, 2, 2, 8, 44, 4, jnp.dtype("float32"))
LAYER = 1


class Inputs:
    """Of a sequence, random ones."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        heads = SHAPE.num_key_heads, SHAPE.values_per_key
        self.mixed = random.normal(size=(LENGTH, SHAPE.num_key_heads, SHAPE.num_channels)).astype(np.float32)
        self.decay = -random.exponential(0.3, (LENGTH, *heads)).astype(np.float32)
        self.rate = random.uniform(size=(LENGTH, *heads)).astype(np.float32)


KERNEL = np.random.default_rng(9).normal(size=(SHAPE.num_key_heads, SHAPE.num_channels, 4)).astype(np.float32)
SEQUENCES = [Inputs(seed) for seed in range(SLOTS)]


def recurrence(inputs: Inputs, corrects: bool) -> np.ndarray:
    """``float64[LENGTH, key_heads, values_per_key, value_dim]``, as the papers' first equations say it."""
    mixed = np.concatenate([np.zeros((3, *inputs.mixed.shape[1:])), inputs.mixed])
    x = np.stack([(mixed[t : t + 4] * KERNEL.transpose(2, 0, 1)).sum(axis=0) for t in range(LENGTH)])
    memory = np.zeros((2, 2, 8, 44))
    out = np.zeros((LENGTH, 2, 2, 44))
    for t in range(LENGTH):
        for head in range(2):
            query, key, values = x[t, head, :8], x[t, head, 8:16], x[t, head, 16:].reshape(2, 44)
            key = key / np.sqrt((key * key).sum())
            for i in range(2):
                faded = memory[head, i] * np.exp(np.float64(inputs.decay[t, head, i]))
                change = inputs.rate[t, head, i] * (values[i] - (key @ faded if corrects else 0))
                memory[head, i] = faded + np.outer(key, change)
                out[t, head, i] = query @ memory[head, i]
    return out


WANTED = {corrects: [recurrence(inputs, corrects) for inputs in SEQUENCES] for corrects in (False, True)}


RUNS: dict[str, RunRows] = {"xla": run_rows, "native": Native(CPU_TILING, Target("cpu")).recur}
needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
NAMES = ["xla", pytest.param("native", marks=needs_compiler)]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(name: str, corrects: bool, tensor: int, state, seqs, positions, is_token, mixed, decay, rate):  # type: ignore[no-untyped-def]
    segments = segments_of(seqs, positions, is_token, num_slots=SLOTS, reach=3)
    mesh, layer = make_mesh(tensor) if tensor > 1 else None, jnp.int32(LAYER)
    mixed, inputs = convolve(mixed, jnp.asarray(KERNEL), state.inputs, segments, layer, mesh=mesh)
    query, key, value = jnp.split(mixed, (8, 16), axis=-1)
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    rows = RuleRows(query, key, value.reshape(*rate.shape, -1), decay, rate)
    read, memory = recur(RUNS[name], rows, state.memory, segments, layer, corrects=corrects, mesh=mesh)
    return read, RecurrentState(inputs, memory)


def run(name: str, steps: list[dict[int, int]], *, corrects: bool = True, tensor: int = 1) -> list[np.ndarray]:
    """What each sequence reads where every step takes so many of its next rows, by slot."""
    random = np.random.default_rng(0)
    state = jax.tree.map(  # of owners before
        lambda x: jax.device_put(random.normal(size=x.shape).astype(x.dtype), x.sharding),
        SHAPE.abstract(make_mesh(tensor)),
    )
    done, read = dict.fromkeys(range(SLOTS), 0), [[] for _ in range(SLOTS)]
    for step in steps:
        seqs, positions = np.full(ROWS, -1, np.int32), np.zeros(ROWS, np.int32)
        rows = [np.full((ROWS, *x.shape[1:]), np.nan, np.float32) for x in vars(SEQUENCES[0]).values()]
        first, places = 0, {}
        for slot, number in step.items():
            number = min(number, LENGTH - done[slot], ROWS - first)
            if number:
                places[slot] = slice(first, first + number)
                taken = slice(done[slot], done[slot] + number)
                seqs[places[slot]], positions[places[slot]] = slot, np.arange(taken.start, taken.stop)
                for row, x in zip(rows, vars(SEQUENCES[slot]).values(), strict=True):
                    row[places[slot]] = x[taken]
                done[slot], first = taken.stop, first + number
        out, state = _step(name, corrects, tensor, state, seqs, positions, seqs >= 0, *rows)
        for slot, place in places.items():
            read[slot].append(np.asarray(out)[place])
    return [np.concatenate(parts) if parts else np.zeros((0, 2, 2, 44)) for parts in read]


def assert_right(read: list[np.ndarray], corrects: bool = True) -> None:
    for found, wanted in zip(read, WANTED[corrects], strict=True):
        np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-4)


STEPS = st.lists(
    st.dictionaries(st.integers(0, SLOTS - 1), st.sampled_from([1, 1, 2, 3, 4, 63, 64, 65, 90]), min_size=1),
    min_size=1, max_size=6,
)  # fmt: skip


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(STEPS)
def test_any_chunks(name: str, corrects: bool, steps: list[dict[int, int]]) -> None:
    assert_right(run(name, steps, corrects=corrects), corrects)


def test_every_border() -> None:
    """A prompt in two chunks, cut everywhere around a tile's end, then decodes beside another's chunk."""
    for border in (1, 2, 3, 4, 63, 64, 65):
        assert_right(run("xla", [{0: border}, {0: 70, 1: 1}, {0: 1, 1: 60, 2: 1}, {0: 1, 2: 2}]))


@needs_compiler
def test_natively_the_cut_does_not_matter_to_the_last_bit() -> None:
    """Nor does company."""
    whole, *_ = run("native", [{0: 90}])
    for border in (1, 2, 3, 50):
        found, *_ = run("native", [{1: 2, 0: border}, {1: 1, 0: 90 - border}])
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("name", NAMES)
def test_heads_on_two_devices(name: str) -> None:
    assert_right(run(name, [{0: 70, 1: 3}, {0: 1, 1: 65}, {0: 1, 1: 1, 2: 4}], tensor=2))


def test_bytes_of_a_sequence() -> None:
    """Qwen3-Next's layers keep 32 value heads of 128 x 128 numbers, and 3 inputs of 8,192 channels."""
    shape = RecurrentShape(36, 4, 16, 2, 128, 128, 4, jnp.dtype("bfloat16"))
    found = shape.abstract(make_mesh())
    assert isinstance(found, RecurrentState)
    assert sum(x.size * x.dtype.itemsize for x in found) == 36 * 4 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
