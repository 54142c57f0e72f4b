"""A layer's mixture of experts beside the products of the experts that its rows choose."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.evaluation.device_bench import Effort, time_launches
from jaxserve.kernels.backend import Target
from jaxserve.models.layers import gate_of
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.matrix import DenseKind, Matrix, MatrixLayout, choose_kind, layouts_of, taken
from jaxserve.models.moe import MoE
from jaxserve.sharding.mesh import make_mesh

LEAST_ROWS = 16
"""Of a program, as the smallest token bucket has: the rest is padding."""
NUM_RANDOM = 1_000_003
"""Numbers that weights are made of."""
ROUNDS = 3


class ExpertRow(NamedTuple):
    num_rows: int
    num_active: int
    """Experts that some row chooses."""
    rounds: Sequence[tuple[float, float]]
    """Seconds of the whole mixture, routing, sorting, products and sums; and of the products alone, each active
    expert's by itself and with its own rows, in one program. In turns."""

    def describe(self) -> dict[str, str]:
        """A row of the table."""
        layer, products = (statistics.median(seconds) for seconds in zip(*self.rounds, strict=True))
        ratios = sorted(layer / products for layer, products in self.rounds)
        return {
            "rows": str(self.num_rows),
            "active experts": str(self.num_active),
            "layer ms": f"{1e3 * layer:.2f}",
            "its experts' products ms": f"{1e3 * products:.2f}",
            "layer / products": f"{statistics.median(ratios):.2f}",
            "from - to": f"{ratios[0]:.2f} - {ratios[-1]:.2f}",
        }


class Case(NamedTuple):
    """Of ExpertRow, what is timed."""

    num_rows: int
    num_active: int
    layer: Callable[[], jax.Array]
    products: Callable[[], list[jax.Array]]

    def measure(self, effort: Effort) -> ExpertRow:
        rounds = [
            (time_launches(self.layer, effort).median, time_launches(self.products, effort).median)
            for _ in range(ROUNDS)
        ]
        return ExpertRow(self.num_rows, self.num_active, rounds)


def expert_cases(config: EngineConfig, rows: Sequence[int]) -> list[Case]:
    """A layer of the model that ``config`` names, of random weights. Raises ConfigError where that has no experts."""
    model = open_checkpoint(config.model, "dummy").config
    if model.experts is None:
        raise ConfigError(f"model must have experts, got {config.model!r}")
    device = jax.devices()[0]
    resolved = config.resolve(model_max_len=model.max_position_embeddings, on_gpu=device.platform == "gpu")
    dtype, mesh = jnp.dtype(resolved.dtype), make_mesh()
    kind = choose_kind(Target.of(device), dtype, mesh)
    graph, state = nnx.split(nnx.eval_shape(lambda: MoE(model, dtype, nnx.Rngs(0))))
    random = {
        ".".join(map(str, path)): _random(variable.shape, dtype, seed)
        for seed, (path, variable) in enumerate(nnx.to_flat_state(state))
    }
    alone = [_expert(kind, random["gate_up"], random["down"], number) for number in range(model.experts.count)]
    parameters = list(taken(random, layouts_of(state), kind).values())
    layer: MoE = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), parameters))
    run = jax.jit(lambda layer, x, numbers: layer(x, numbers if kind.skips_padding else None))
    cases = []
    for num_rows in rows:
        num_all = max(LEAST_ROWS, num_rows)
        x = _random((num_all, model.hidden_size), dtype, num_rows)
        numbers = jnp.where(jnp.arange(num_all) < num_rows, jnp.arange(num_all, dtype=jnp.int32), -1)
        _, chosen = layer.choose(x[:num_rows], None)
        sizes = np.bincount(np.asarray(chosen).reshape(-1), minlength=model.experts.count).tolist()
        active = [(alone[number], x[:size]) for number, size in enumerate(sizes) if size]
        products = jax.jit(lambda active: [_multiplied(*each) for each in active]).lower(active).compile()
        cases.append(Case(num_rows, len(active), partial(run, layer, x, numbers), partial(products, active)))
    return cases


def _random(shape: Sequence[int], dtype: jnp.dtype, seed: int) -> jax.Array:
    """Small numbers, again and again the same: quickly made."""
    some = 0.02 * jax.random.normal(jax.random.key(seed), (NUM_RANDOM,), dtype)
    return jnp.resize(some, tuple(shape))


def _expert(kind: DenseKind, gate_up: jax.Array, down: jax.Array, number: int) -> tuple[Matrix, Matrix]:
    return kind.of(gate_up[:, number].mT, MatrixLayout(num_outputs=2, gate="silu")), kind.of(
        down[number].mT, MatrixLayout()
    )


def _multiplied(expert: tuple[Matrix, Matrix], x: jax.Array) -> jax.Array:
    gate_up, down = expert
    return down.multiply(gate_up.gated(x, None, gate_of("silu"), None))
