"""From a checkpoint's tensors to parameters on the devices."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.models.config import ModelError
from jaxserve.models.weights import TensorSource, Weight

# Rotary tables that old checkpoints carry, and the output head that some carry besides a tied embedding.
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq|lm_head\.weight")


def assemble(
    where: object, source: TensorSource, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]
) -> dict[str, jax.Array]:
    """Build every parameter of ``abstract`` from ``source``, cast it, and put it on the devices of its sharding.

    A parameter without a sharding goes to the first device. Raises one ModelError with everything that does not fit,
    before any device memory is taken; ``where`` is the checkpoint's name in it.
    """
    check(where, source, abstract, weights)

    def load(item: tuple[str, jax.ShapeDtypeStruct]) -> jax.Array:
        name, spec = item
        built = weights[name].build(*map(source.read, weights[name].names))
        # Always a fresh copy: JAX may keep using the host's memory, which must not be a file that somebody replaces.
        return jax.make_array_from_callback(
            spec.shape, placement(spec), lambda index: np.array(built[index], dtype=spec.dtype, order="C")
        )

    # Dequantising and casting run without Python's lock; few threads bound the memory that is in flight.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(abstract, pool.map(load, abstract.items()), strict=True))


def placement(spec: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return spec.sharding or SingleDeviceSharding(jax.local_devices()[0])


def check(
    where: object, source: TensorSource, abstract: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Weight]
) -> None:
    """Raise ModelError with every missing, unexpected and mis-shaped tensor; reads names and shapes only."""
    names = source.names()
    wanted = {name for parameter in abstract for name in weights[parameter].names}
    problems = [f"missing {name}" for name in sorted(wanted - names)]
    problems += [f"unexpected {name}" for name in sorted(names - wanted) if not _HARMLESS.fullmatch(name)]
    for parameter, spec in abstract.items():
        weight = weights[parameter]
        if names.issuperset(weight.names):
            shapes = {name: source.shape(name) for name in weight.names}
            if not _fits(weight, shapes, spec.shape):
                found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
                problems.append(f"mis-shaped {found} for {parameter} {spec.shape}")
    report(where, problems)


def report(where: object, problems: list[str]) -> None:
    if problems:
        raise ModelError(f"{where} does not fit the model: " + "; ".join(problems))


def _fits(weight: Weight, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> bool:
    """Try the build on stand-ins that take no memory; where it has to copy, they take one byte an element."""
    stand_ins = [np.broadcast_to(np.int8(0), shape) for shape in shapes.values()]
    try:
        return weight.build(*stand_ins).shape == wanted
    except ValueError:  # numpy's, from reshaping or joining what does not fit
        return False
