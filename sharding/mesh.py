"""Device meshes."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ConfigError


def make_mesh(tensor: int = 1, pipe: int = 1) -> Mesh:
    """A mesh of the first ``pipe * tensor`` devices, with the axes ``pipe``, the stages of a pipeline, and ``tensor``.

    The devices that share a stage are neighbours. ConfigError when there are too few.
    """
    devices = jax.devices()
    if tensor * pipe > len(devices):
        field, value = "tensor_parallel", f"{tensor}"
        if pipe > 1:
            field, value = "tensor_parallel * pipeline_parallel", f"{tensor} * {pipe}"
        raise ConfigError(f"{field} must not exceed the {len(devices)} devices, got {value}")
    return Mesh(np.array(devices[: tensor * pipe]).reshape(pipe, tensor), ("pipe", "tensor"))
