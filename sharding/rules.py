"""Logical axis names of parameters and their place on the mesh: one table for every model."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "tensor",
    "embed": None,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def divided(config: ModelConfig, mesh: Mesh, *, expert_parallel: bool = False) -> ModelConfig:
    """``config`` of the model on a mesh, whose devices share its heads, and with ``expert_parallel`` its experts, of
    which otherwise each has a share of all. Raises ModelError where heads do not divide."""
    tensor = mesh.shape["tensor"]
    local = config.of_kind(local=True)
    for name, count in (
        ("num_heads", config.num_heads),
        ("num_kv_heads", config.num_kv_heads),
        ("num_kv_heads", local.num_kv_heads),
    ):
        if count % tensor and (name == "num_heads" or tensor % count):
            raise ModelError(f"{name} of {count} does not divide over tensor_parallel {tensor}")
    return replace(config, tensor_parallel=tensor, expert_parallel=expert_parallel)


def abstract_model(
    model_class: type[Decoder], config: ModelConfig, *, max_len: int, dtype: jnp.dtype
) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of a model and its parameters' shapes, without allocating any."""
    return nnx.split(nnx.eval_shape(lambda: model_class(config, max_len=max_len, dtype=dtype, rngs=nnx.Rngs(params=0))))


def abstract_parameters(state: nnx.State, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameter path ("layers.0.attention.qkv") -> shape, dtype and sharding, in the order of the state's leaves.

    Raises ModelError, naming the parameter and the dimension, where a sharded dimension does not divide.
    """
    parameters = {}
    for path, variable in nnx.to_flat_state(state):
        name, value = ".".join(map(str, path)), variable.get_value()
        axes = variable.get_metadata()["axes"]
        spec = partition_spec(axes)
        for axis, size, target in zip(axes, value.shape, spec, strict=True):
            if target is not None and size % mesh.shape[target]:
                raise ModelError(
                    f"{name}: dimension {axis!r} of {size} does not divide over {mesh.shape[target]} devices"
                )
        parameters[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))
    return parameters
