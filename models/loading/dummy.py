"""Seeded random weights in a model's shape, made on the device: for performance work, without any download."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxserve.models.loading.assemble import placement


def random_parameters(abstract: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, jax.Array]:
    """Norms are 1, everything else is normally distributed with a standard deviation of 0.02."""
    keys = jax.random.split(jax.random.key(seed), len(abstract))
    return {
        name: _make(spec.shape, spec.dtype, placement(spec), name.endswith("norm.weight"))(key)
        for (name, spec), key in zip(abstract.items(), keys, strict=True)
    }


@functools.cache
def _make(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding, is_norm: bool
) -> jax.stages.Wrapped:
    """One program for all parameters of a shape; each device makes its own shard."""

    def make(key: jax.Array) -> jax.Array:
        return jnp.ones(shape, dtype) if is_norm else jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    return jax.jit(make, out_shardings=sharding)
