"""Experts divided over virtual devices: the tokens of transformers, and what one device makes of the same rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import ModelError
from jaxserve.evaluation.compiled import collectives
from jaxserve.models.config import Experts
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.matrix import DenseMatrix, layouts_of, taken
from jaxserve.models.moe import MoE
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import abstract_parameters, divided
from tests.models.golden import Golden
from tests.sharding.test_tensor_parallel import LLAMA, programs, serve

EIGHT = Experts(count=8, per_token=2, intermediate_size=32, normalise=True, layers=tuple(range(9)))
MIXTRAL = dataclasses.replace(LLAMA, architecture="MixtralForCausalLM", experts=EIGHT)


@pytest.mark.parametrize(
    ("name", "tensor", "pipe"), [("qwen3_moe", 2, 1), ("gpt_oss_sinks", 4, 1), ("llama4_experts", 2, 2)]
)
def test_tokens_are_those_of_transformers(name: str, tensor: int, pipe: int, tiny_tokenizer: Path) -> None:
    golden = Golden(name)
    config = EngineConfig(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), tensor_parallel=tensor, pipeline_parallel=pipe,
        enable_expert_parallel=True, token_budget=16, max_num_seqs=2, max_model_len=golden.length + 1, block_size=8,
    )  # fmt: skip
    engine = Engine(config, show_progress=False)
    assert serve(engine, [golden.prompt] * 2, len(golden.greedy)) == [golden.greedy] * 2
    engine.close()


@pytest.mark.parametrize("name", ["qwen2_moe_shared", "gpt_oss_sinks", "llama4_experts"])
def test_a_layer_makes_the_same_on_any_mesh(name: str) -> None:
    """With a shared expert, with biases and a gate of its own, with inputs that are weighed."""
    config = open_checkpoint(str(Golden(name).checkpoint)).config
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, config.hidden_size)), jnp.float32)
    expected, *others = (mixed(config, x, *mesh) for mesh in ((1, False), (2, False), (2, True), (4, True)))
    # Float32 sums in another order differ by their summands' scale, also where the sum happens to be small.
    scale = float(np.abs(expected).max())
    for found in others:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6 * scale)


def mixed(config: object, x: jax.Array, tensor: int, expert_parallel: bool) -> np.ndarray:
    mesh = make_mesh(tensor)
    model = divided(config, mesh, expert_parallel=expert_parallel)  # type: ignore[arg-type]
    graph, state = nnx.split(nnx.eval_shape(lambda: MoE(model, jnp.dtype("float32"), nnx.Rngs(0))))
    rng, parameters = np.random.default_rng(1), {}
    for name, spec in abstract_parameters(state, mesh).items():
        parameters[name] = jax.device_put(rng.normal(size=spec.shape).astype(np.float32), spec.sharding)
    matrices = list(taken(parameters, layouts_of(state), DenseMatrix).values())

    @jax.jit
    def run(matrices: list[jax.Array], x: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), matrices))(x, None)

    return np.asarray(run(matrices, x))


def test_two_all_reduces_a_layer_and_nothing_gathered() -> None:
    """As of tensor parallelism, and each device holds experts of its own."""
    step = programs(MIXTRAL, 4, enable_expert_parallel=True)
    held = {name: spec.sharding.shard_shape(spec.shape) for name, spec in step.abstract_parameters.items()}
    assert held["layers.0.mlp.gate_up"] == (2, 2, 64, 32)
    assert held["layers.0.mlp.down"] == (2, 32, 64)
    text = step.lower_forward(16).compile().as_text()
    assert collectives(text, "run_layer") == {"all-reduce": 2 * LLAMA.num_layers}


def test_experts_that_do_not_divide_are_named() -> None:
    six = dataclasses.replace(MIXTRAL, experts=dataclasses.replace(EIGHT, count=6))
    message = "layers.0.mlp.down: dimension 'experts' of 6 does not divide over 4 devices"
    with pytest.raises(ModelError, match=message):
        programs(six, 4, enable_expert_parallel=True)
    assert programs(six, 4).abstract_parameters["layers.0.mlp.gate_up"].shape == (2, 6, 64, 32)
