"""Work that every device does on rows of its own."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def over_rows[*Arrays, R](
    function: Callable[[jax.Array, *Arrays], R], mesh: Mesh, logits: jax.Array, *arrays: *Arrays
) -> R:
    """``function`` of logits and of other arrays with a row for each of theirs, every device computing rows of its own.

    Logits ``[R, vocab]`` come divided by the vocabulary. One all-to-all divides them by rows instead, and the function
    needs no collectives, which branches and loops of a CUDA graph may not have.
    """
    if mesh.size == 1:
        return function(logits, *arrays)

    def compute(logits: jax.Array, *arrays: *Arrays) -> R:
        logits = jax.lax.all_to_all(_own_rows(logits, "pipe"), "tensor", 0, 1, tiled=True)
        return function(logits, *jax.tree.map(lambda array: _own_rows(_own_rows(array, "pipe"), "tensor"), arrays))

    num_rows = len(logits)
    missing = -num_rows % mesh.size
    padded = jax.tree.map(lambda array: jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))), (logits, *arrays))
    specs = PartitionSpec(None, "tensor"), *(PartitionSpec() for _ in arrays)
    results = jax.shard_map(
        compute, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(("pipe", "tensor")), check_vma=False
    )(*padded)
    # Everywhere at once, else the partitioner divides what is made of them, and what that is made of.
    results = jax.lax.with_sharding_constraint(results, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda array: array[:num_rows], results)


def _own_rows(array: jax.Array, axis: str) -> jax.Array:
    """This device's share of the rows, under shard_map."""
    num_rows = len(array) // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axis) * num_rows, num_rows)
