"""Device meshes."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.errors import ConfigError


def make_mesh(tensor: int = 1, pipe: int = 1) -> Mesh:
    """A mesh of the first ``pipe * tensor`` devices, with the axes ``pipe``, the stages of a pipeline, and ``tensor``.

    The devices that share a stage are neighbours. ConfigError when there are too few, and where one of several hosts
    would be left out.
    """
    (mesh,) = make_meshes(1, tensor, pipe)
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise ConfigError(
            f"tensor_parallel * pipeline_parallel must be the {jax.device_count()} devices of all "
            f"{jax.process_count()} hosts, got {tensor} * {pipe}"
        )
    return mesh


def make_meshes(count: int, tensor: int, pipe: int) -> list[Mesh]:
    """As many meshes, one after the other and with no device in common. ConfigError when there are too few."""
    devices, size = jax.devices(), tensor * pipe
    if count * size > len(devices):
        factors = {"data_parallel": count, "tensor_parallel": tensor, "pipeline_parallel": pipe}
        names = " * ".join(name for name, value in factors.items() if value > 1)
        values = " * ".join(str(value) for value in factors.values() if value > 1)
        raise ConfigError(f"{names} must not exceed the {len(devices)} devices, got {values}")
    return [_mesh(devices[i * size : (i + 1) * size], tensor, pipe) for i in range(count)]


def _mesh(devices: Sequence[jax.Device], tensor: int, pipe: int) -> Mesh:
    return Mesh(np.array(devices).reshape(pipe, tensor), ("pipe", "tensor"))
