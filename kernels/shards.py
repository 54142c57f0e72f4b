"""Kernels on a mesh: each device has its own heads."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh


def per_shard[**P, R](
    function: Callable[P, R], mesh: Mesh | AbstractMesh | None, in_specs: object, out_specs: object
) -> Callable[P, R]:
    """Kernels see one device's heads; the partitioner cannot look into them."""
    if mesh is None or mesh.shape["tensor"] == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
