"""Kernels on a mesh: each device has its own heads, or a share of a mixture's experts."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec


def per_shard[**P, R](
    function: Callable[P, R], mesh: Mesh | AbstractMesh | None, in_specs: object, out_specs: object
) -> Callable[P, R]:
    """Kernels see one device's heads; the partitioner cannot look into them."""
    if mesh is None or mesh.shape["tensor"] == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def summed_over_shards[**P](function: Callable[P, jax.Array], in_specs: object) -> Callable[P, jax.Array]:
    """The sum of what the devices of the mesh that is in use along its axis ``tensor`` make of their shares."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1:
        return function

    def summed(*args: P.args, **kwargs: P.kwargs) -> jax.Array:
        return jax.lax.psum(function(*args, **kwargs), "tensor")

    return jax.shard_map(summed, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)


def own_share(count: int) -> tuple[int, jax.Array | int]:
    """Of so many things that the devices along ``tensor`` divide, the number of this device's, and its first."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1:
        return count, 0
    share = count // mesh.shape["tensor"]
    return share, share * jax.lax.axis_index("tensor")
