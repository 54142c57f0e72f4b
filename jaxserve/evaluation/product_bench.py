"""Matrix products of a CPU: by dense weights of both types, and by codes that meet float or int8 rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.errors import ConfigError
from jaxserve.evaluation.device_bench import THOROUGH, Effort, time_launches
from jaxserve.kernels import native
from jaxserve.kernels.backend import Target
from jaxserve.models.matrix import Matrix, MatrixLayout, PanelCodes, PanelMatrix, QuantisedMatrix

SHAPES = {"qkv": (960, 576), "gate-up": (3072, 576), "down": (576, 1536), "4096": (4096, 4096)}
"""``[outputs, inputs]``: SmolLM2-135M's, and one of a larger model."""
ROWS = (1, 4, 16, 64, 256)
KINDS = (
    "float32", "bfloat16", "W4A16", "W4A8", "W8A16", "W8A8", "W4A16 bfloat16", "W4A8 bfloat16", "W8A16 bfloat16",
)  # fmt: skip
"""Of weights; rows are float32, but where it says bfloat16."""
GROUP = 32
LEAST_BYTES = 1 << 27
"""Of the matrices that a program multiplies by in turn, so that each comes from memory, as in an engine's step."""


def measure_products(
    shapes: Sequence[str], kinds: Sequence[str], rows: Sequence[int], effort: Effort = THOROUGH
) -> Iterator[Mapping[str, str]]:
    """A row of the table for each shape and kind: microseconds by rows of x. Raises ConfigError without native
    products."""
    if not native.serves(Target.of(jax.devices()[0]), jnp.dtype("float32")):
        raise ConfigError("products are of CPUs, and need a C++ compiler")
    for shape in shapes:
        for kind in kinds:
            matrix = _random(kind, *SHAPES[shape])
            num_bytes = sum(array.nbytes for array in jax.tree.leaves(matrix))
            matrices = [matrix, *(jax.tree.map(jnp.copy, matrix) for _ in range(LEAST_BYTES // num_bytes))]
            seconds = {count: _seconds(matrices, kind, count, SHAPES[shape][1], effort) for count in rows}
            yield {
                "product": shape,
                "weights": kind,
                "MB": f"{num_bytes / 1e6:.3g}",
                **{f"{count} rows, us": f"{1e6 * one:.1f}" for count, one in seconds.items()},
            }


def _random(kind: str, outputs: int, inputs: int) -> Matrix:
    layout, key = MatrixLayout(), jax.random.key(0)
    if not kind.startswith("W"):
        return PanelMatrix.of(jax.random.normal(key, (outputs, inputs), kind), layout)
    bits = int(kind[1])
    scales, minima = jax.random.uniform(key, (2, outputs, inputs // GROUP), jnp.float16, 0.01, 0.02)
    codes = jax.random.bits(key, (outputs, inputs * bits // 8), jnp.uint8)
    matrix = QuantisedMatrix(
        codes, scales, None, minima, None, layout, bits, GROUP, zero=0, dtype=jnp.dtype("float32"), division=None
    )
    return PanelCodes.of(matrix, is_int8="A8" in kind)


def _seconds(matrices: list[Matrix], kind: str, rows: int, inputs: int, effort: Effort) -> float:
    """Of one product among those by all of ``matrices``, one after the other."""
    x = jax.random.normal(jax.random.key(1), (rows, inputs), "bfloat16" if kind.endswith("bfloat16") else "float32")

    @jax.jit
    def products(matrices: list[Matrix], x: jax.Array) -> jax.Array:
        numbers = jnp.arange(rows, dtype=jnp.int32)
        for matrix in matrices:
            y = matrix.multiply(x, numbers)
            numbers = numbers + (0 * y[0, 0]).astype(jnp.int32)  # XLA would run them side by side
        return numbers

    return time_launches(partial(products, matrices, x), effort).per(len(matrices)).median
