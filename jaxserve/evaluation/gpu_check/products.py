"""Products of Mistral-7B's layers with weights of 4 bits, beside the same in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.engine.compile import gpu_options
from jaxserve.evaluation.device_bench import QUICK, Ceilings, Effort, Work, measure_ceilings, time_launches
from jaxserve.evaluation.gpu_check.stage import Context, StageFailed
from jaxserve.evaluation.kernel_bench import MOST_ERROR
from jaxserve.kernels.backend import Target
from jaxserve.models.layers import gate_of
from jaxserve.models.matrix import DenseMatrix, Matrix, MatrixLayout, QuantisedMatrix, coded_kind
from jaxserve.sharding.mesh import make_mesh

ROWS = (16, 1, 32, 256, 2048)
"""The most telling ones first."""
TINY_ROWS = (3, 300)
BITS, GROUP = 4, 128
SCALE_BYTES = 2
KINDS = ("bfloat16", "codes")
LAST_SECONDS = 15.0
"""Nothing is begun with less left."""
TINY_EFFORT = Effort(1, 0.0, 0.1)
BFLOAT16 = jnp.dtype("bfloat16")
Chain = Callable[[], jax.Array]
Layer = tuple[Matrix, Matrix]


class Pair(NamedTuple):
    """Two products of a layer, one after the other."""

    first: tuple[int, ...]
    """Outputs."""
    inner: int
    """Outputs of the first that the second takes: a part of them, or with two halves what a gate makes of these."""
    hidden: int
    layers: int
    """So many that their codes do not fit into the L2 cache together."""
    group: int = GROUP

    @property
    def values(self) -> int:
        """Of both matrices."""
        return self.hidden * (math.prod(self.first) + self.inner)

    def apply(self, layer: Layer, x: jax.Array) -> jax.Array:
        """``[T, hidden]`` -> the same."""
        first, second = layer
        if len(self.first) > 1:
            return second.multiply(first.gated(x, None, gate_of("silu"), None))
        return second.multiply(first.multiply(x)[:, : self.inner])

    def work(self, rows: int, kind: str) -> Work:
        """Weights and activations are read once, results are written."""
        value_bytes = BITS / 8 + SCALE_BYTES / self.group if kind == "codes" else BFLOAT16.itemsize
        activations = 2 * self.hidden + math.prod(self.first) + self.inner
        return Work(2.0 * rows * self.values, value_bytes * self.values + rows * activations * BFLOAT16.itemsize)


PAIRS: Mapping[str, Pair] = {"MLP": Pair((2, 14336), 14336, 4096, 4), "attention": Pair((6144,), 4096, 4096, 16)}
TINY_PAIRS: Mapping[str, Pair] = {"MLP": Pair((2, 96), 96, 64, 2, 32), "attention": Pair((96,), 64, 64, 2, 32)}


def run(context: Context) -> None:
    effort = TINY_EFFORT if context.tiny else QUICK
    ceilings = measure_ceilings(effort)
    context.records.add("ceilings", **ceilings._asdict())
    wrong = [
        record
        for name, pair in (TINY_PAIRS if context.tiny else PAIRS).items()
        for record in _measure(context, name, pair, ceilings, effort)
        if "failure" in record
    ]
    if wrong:
        raise StageFailed(f"{len(wrong)} failed, the first with {wrong[0]['failure']}")


def _measure(context: Context, name: str, pair: Pair, ceilings: Ceilings, effort: Effort) -> list[dict[str, Any]]:
    """Of one pair, for each number of rows: compiled side by side, then checked and timed alone."""
    codes = [_random_layer(pair, number) for number in range(pair.layers)]
    layers = {"bfloat16": [_dense(layer) for layer in codes], "codes": [_coded(layer) for layer in codes]}
    records = []
    for rows in TINY_ROWS if context.tiny else ROWS:
        if context.left_seconds < LAST_SECONDS:
            break
        x = jax.random.normal(jax.random.key(rows), (rows, pair.hidden), BFLOAT16)
        with ThreadPoolExecutor() as pool:
            prepared = {kind: pool.submit(_prepare, pair, layers[kind], codes[0], x) for kind in KINDS}
        for kind, one in prepared.items():
            work = pair.work(rows, kind)
            record = {"pair": name, "rows": rows, "product": kind, "floor_seconds": work.floor_seconds(ceilings)}
            try:
                error, chain = one.result()
                if not error <= MOST_ERROR:
                    raise ValueError(f"error of {error:.2g} above {MOST_ERROR}")
                seconds = time_launches(chain, effort).per(pair.layers)
                record |= {"error": error, "seconds": seconds._asdict()}
            except Exception as failure:  # whatever a kernel does, the others must be measured
                record |= {"failure": f"{type(failure).__name__}: {failure}"[:500]}
            records.append(record)
            context.records.add("product", **record)
    return records


def _prepare(
    pair: Pair, layers: Sequence[Layer], codes: tuple[QuantisedMatrix, ...], x: jax.Array
) -> tuple[float, Chain]:
    """The larger of two products' errors, beside the same codes multiplied by XLA, and what is to be timed."""
    errors = []
    for matrix, same in zip(layers[0], codes, strict=True):
        wide = jnp.resize(x, (len(x), same.scales.shape[-1] * same.group))
        found, expected = (
            jax.jit(type(m).multiply, static_argnums=3)(m, wide, None, jnp.float32) for m in (matrix, same)
        )
        errors.append(float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)))
    chain = _chain(pair, layers, x)
    jax.block_until_ready(chain())
    return max(errors), chain


def _chain(pair: Pair, layers: Sequence[Layer], x: jax.Array) -> Chain:
    """Starts a program of all layers, each on what the one before gave."""
    options = gpu_options("cublaslt") if jax.default_backend() == "gpu" else None

    # Donated, for the same buffers in every launch: else XLA captures its CUDA graph anew.
    @partial(jax.jit, donate_argnums=0, compiler_options=options)
    def run(x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
        # Or it would vanish, or grow, from launch to launch.
        x = (x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))).astype(BFLOAT16)
        for layer in layers:
            x = pair.apply(layer, x)
        return x

    x = jnp.copy(x)

    def launch() -> jax.Array:
        nonlocal x
        x = run(x, layers)
        return x

    return launch


def _random_layer(pair: Pair, seed: int) -> tuple[QuantisedMatrix, QuantisedMatrix]:
    keys = jax.random.split(jax.random.key(seed))
    return _random(pair.first, pair.hidden, pair.group, keys[0]), _random(
        (pair.hidden,), pair.inner, pair.group, keys[1]
    )


def _random(outputs: tuple[int, ...], inputs: int, group: int, key: jax.Array) -> QuantisedMatrix:
    """Whose products are as large as what is multiplied."""
    scale = 1 / (math.sqrt(inputs) * 4.6)  # codes are as far from 8, on average
    everywhere = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())
    return QuantisedMatrix(
        codes=jax.device_put(jax.random.bits(key, (*outputs, inputs // 2), jnp.uint8), everywhere),
        scales=jax.device_put(jnp.full((*outputs, inputs // group), scale, jnp.float16), everywhere),
        zeros=None, minima=None, order=None, layout=MatrixLayout(num_outputs=len(outputs)), bits=BITS, group=group,
        zero=8, dtype=BFLOAT16, division=None,
    )  # fmt: skip


def _dense(layer: Sequence[QuantisedMatrix]) -> Layer:
    first, second = (DenseMatrix(jax.jit(_numbers)(codes), codes.layout) for codes in layer)
    return first, second


def _numbers(codes: QuantisedMatrix) -> jax.Array:
    outputs = codes.codes.shape[:-1]
    flat: QuantisedMatrix = jax.tree.map(lambda array: array.reshape(math.prod(outputs), -1), codes)
    return flat.numbers().reshape(*outputs, -1)


def _coded(layer: Sequence[QuantisedMatrix]) -> Layer:
    target = Target.of(jax.devices()[0])
    first, second = (coded_kind(codes, target).of(codes, target) for codes in layer)
    return first, second
