"""Device meshes."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ConfigError


def make_mesh(tensor: int = 1) -> Mesh:
    """A mesh with the axis ``tensor`` over the first ``tensor`` devices; ConfigError when there are fewer."""
    devices = jax.devices()
    if tensor > len(devices):
        raise ConfigError(f"tensor_parallel must not exceed the {len(devices)} devices, got {tensor}")
    return Mesh(np.array(devices[:tensor]), ("tensor",))
