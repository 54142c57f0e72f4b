"""Device meshes."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh


def make_mesh(tensor: int = 1) -> Mesh:
    """A mesh with the axis ``tensor`` over the first ``tensor`` devices; ValueError when there are fewer."""
    devices = jax.devices()
    if tensor > len(devices):
        raise ValueError(f"tensor axis of {tensor} needs as many devices, found {len(devices)}")
    return Mesh(np.array(devices[:tensor]), ("tensor",))
