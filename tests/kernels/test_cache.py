"""The KV cache: what it takes of a device, and how it begins."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.kernels.cache import KVCacheShape, stored_dtype
from jaxserve.sharding.mesh import make_mesh

SHAPE = KVCacheShape(num_layers=4, num_kv_heads=2, head_dim=8, page_size=16, dtype=jnp.dtype("bfloat16"))


@pytest.mark.parametrize(("tensor", "pipe"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_devices_share_layers_and_heads(tensor: int, pipe: int) -> None:
    """Each has an equal part of every block's bytes, and all scales of its layers."""
    cache = SHAPE.abstract(10, make_mesh(tensor, pipe))
    for pages in (cache.k, cache.v):
        assert pages.sharding.shard_shape(pages.shape) == (4 // pipe * 10, 16, 2 // tensor, 8)
    assert cache.scales.sharding.shard_shape(cache.scales.shape) == (4 // pipe, 2)
    num_bytes = sum(pages.size * pages.dtype.itemsize for pages in (cache.k, cache.v))
    assert num_bytes == 10 * SHAPE.block_bytes == 10 * 4 * 16 * 2 * 2 * 8 * 2


def test_it_begins_with_nothing_and_scales_of_one() -> None:
    mesh = make_mesh(2, 2)
    cache, abstract = SHAPE.zeros(3, mesh), SHAPE.abstract(3, mesh)
    for made, planned in zip(jax.tree.leaves(cache), jax.tree.leaves(abstract), strict=True):
        assert (made.shape, made.dtype, made.sharding) == (planned.shape, planned.dtype, planned.sharding)
    assert not np.asarray(cache.k, np.float32).any()
    assert not np.asarray(cache.v, np.float32).any()
    assert (np.asarray(cache.scales) == 1).all()


def test_keys_that_are_values_take_half() -> None:
    """One array of pages, one scale for each layer, and blocks of one."""
    shape, mesh, numbers = replace(SHAPE, has_values=False), make_mesh(), jnp.array([1, 2])
    assert 2 * shape.block_bytes == SHAPE.block_bytes
    cache = shape.zeros(3, mesh, [np.array([[0.5, 2.0]] * 4, np.float32)])
    assert cache.v is None
    assert cache.scales.tolist() == [[0.5]] * 4
    blocks = [(jnp.full_like(block, 1 + i),) for i, (block,) in enumerate(shape.blocks_of(cache, numbers))]
    assert {block.shape for (block,) in blocks} == {one.shape for one in shape.abstract_block(mesh)}
    changed = shape.with_blocks(cache, numbers, blocks)
    assert np.asarray(changed.k, np.float32).reshape(4, 3, -1).mean(axis=-1).tolist() == [[0, 1, 2]] * 4


def test_blocks_of_layers_of_two_shapes() -> None:
    """A block has pages of both, and comes back as it was."""
    shape = replace(SHAPE, local=replace(SHAPE, num_layers=3, head_dim=4))
    assert shape.block_bytes == 16 * 2 * (4 * 2 * 8 + 3 * 2 * 4) * 2
    mesh = make_mesh(2)
    cache = jax.tree.map(
        lambda x: jax.device_put(jax.random.normal(jax.random.key(x.size), x.shape).astype(x.dtype), x.sharding),
        shape.zeros(6, mesh),
    )
    blocks = shape.blocks_of(cache, jnp.array([2, 5]))
    assert [[x.shape for x in block] for block in blocks] == [[x.shape for x in shape.abstract_block(mesh)]] * 2
    moved = shape.with_blocks(shape.zeros(6, mesh), jnp.array([4, 1]), blocks)
    for before, after in zip(blocks, shape.blocks_of(moved, jnp.array([4, 1])), strict=True):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_what_is_stored() -> None:
    bfloat16 = jnp.dtype("bfloat16")
    assert stored_dtype("auto", bfloat16) == bfloat16
    assert stored_dtype("fp8_e4m3", bfloat16) == jnp.dtype(jnp.float8_e4m3fn)
