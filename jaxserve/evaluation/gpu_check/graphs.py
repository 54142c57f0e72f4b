"""Do CUDA graphs compute what single launches do: a chain of kernels, and the sampler's branches and loops."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine.compile import GPU_OPTIONS
from jaxserve.engine.sampler import SamplingInputs, sample
from jaxserve.evaluation.attention_batch import NO_GRAPHS, attention_chain, random_batch
from jaxserve.evaluation.gpu_check.stage import Context, StageFailed
from jaxserve.evaluation.kernel_bench import SHAPE, TINY_SHAPE
from jaxserve.kernels.backend import Target
from jaxserve.kernels.registry import choose_backend

RUNS = 3
"""Launch by launch, captured, replayed."""
NUM_CALLS = 4
SEQUENCES = ((3000, 1), (100, 1), (0, 70), (500, 200))
TINY_SEQUENCES = ((30, 1), (0, 9))


def run(context: Context) -> None:
    checks = {"chain of attention kernels": _chain(context.tiny), **_sampler(context.tiny)}
    for name, equal in checks.items():
        context.records.add("graphs", check=name, equal=equal)
    if not all(checks.values()):
        raise StageFailed("CUDA graphs compute something else than single launches")


def _chain(tiny: bool) -> bool:
    shape = TINY_SHAPE if tiny else SHAPE
    backend = choose_backend("xla" if tiny else "triton", Target.of(jax.devices()[0]), shape)
    batch = random_batch(TINY_SEQUENCES if tiny else SEQUENCES, shape, backend, cache_bytes=0)
    graph, single = (attention_chain(batch, NUM_CALLS, graphs=graphs) for graphs in (True, False))
    return all(_same(graph(), single()) for _ in range(RUNS))


def _sampler(tiny: bool) -> dict[str, bool]:
    """Each kind of batch several times in one program, whose branches go another way each time."""
    rows, vocab = (4, 300) if tiny else (64, 32000)
    logits = 4 * jax.random.normal(jax.random.key(0), (rows, vocab))
    graph, single = (jax.jit(sample, compiler_options=options) for options in (GPU_OPTIONS, GPU_OPTIONS | NO_GRAPHS))
    equal: dict[str, bool] = {}
    for _ in range(RUNS):
        for name, inputs in _sampling_inputs(rows):
            equal[name] = equal.get(name, True) and _same(graph(logits, inputs), single(logits, inputs))
    return equal


def _sampling_inputs(rows: int) -> Iterator[tuple[str, SamplingInputs]]:
    ones, numbers = jnp.ones(rows), jnp.arange(rows, dtype=jnp.int32)
    greedy = SamplingInputs(0 * ones, ones, 0 * ones, 0 * numbers, numbers, numbers)
    random = greedy._replace(temperature=ones)
    yield "greedy rows", greedy
    yield "random rows", random
    yield "top-k", random._replace(top_k=numbers % 50)
    yield "top-p", random._replace(top_p=0.9 * ones)
    yield (
        "top-k and top-p beside greedy rows",
        random._replace(temperature=(numbers % 2).astype(jnp.float32), top_k=numbers % 50, top_p=0.9 * ones),
    )


def _same(one: jax.Array, other: jax.Array) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))
