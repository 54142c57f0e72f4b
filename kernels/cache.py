"""What the devices keep of sequences: its shape, type and bytes, how it lies on a mesh, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import dynamic_index_in_dim
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class RecurrentState[Array](NamedTuple):
    """Of the layers whose memory of a sequence does not grow, by layer and sequence slot (kernels/recurrent.py)."""

    inputs: Array
    """``[layers, S, key_heads, channels, conv_width - 1]``: the convolution's last inputs, oldest first."""
    memory: Array
    """``float32[layers, S, key_heads, values_per_key, key_dim, value_dim]``"""


class KVCache[Array](NamedTuple):
    """Keys and values of all layers, ``[layers * pages, page_size, kv_heads, head_dim]`` each.

    ``v`` is None where a key is its own value (models/latent.py). Page ``p`` of layer ``l`` is row ``l * pages + p``,
    so a layer is an offset and no slice is ever copied. Page 0 of each layer is the dummy page that padding rows write
    to.
    """

    k: Array
    v: Array | None
    scales: Array
    """``float32[layers, 2]``: what a layer's stored keys and values stand for is so many times as large; one number
    where a key is its own value. Read where ``is_quantised``."""
    recurrent: RecurrentState[Array] | None = None
    """Of the other layers, where a model has layers that have no keys and values."""

    @property
    def pages(self) -> tuple[Array, ...]:
        """The arrays of pages: the first has the keys, the last the values."""
        return (self.k,) if self.v is None else (self.k, self.v)

    def with_pages(self, pages: Sequence[Array]) -> KVCache[Array]:
        """The cache with these as its ``pages``."""
        return self._replace(k=pages[0], v=None if self.v is None else pages[1])


def is_quantised(stored: jnp.dtype) -> bool:
    """Whether keys and values of this type, float8_e4m3fn, are to be multiplied by scales."""
    return stored.itemsize == 1


def stored_dtype(kv_cache_dtype: str, dtype: jnp.dtype) -> jnp.dtype:
    """What config.KV_CACHE_DTYPES' ``kv_cache_dtype`` stores of keys and values that are computed in ``dtype``."""
    return jnp.dtype(jnp.float8_e4m3fn) if kv_cache_dtype == "fp8_e4m3" else dtype


def cache_specs(*, pipe: str | None = None, tensor: str | None = None) -> KVCache[PartitionSpec]:
    """How pages are divided: layers over the mesh axis ``pipe``, KV heads over ``tensor``."""
    pages = PartitionSpec(pipe, None, tensor)
    return KVCache(k=pages, v=pages, scales=PartitionSpec(pipe))


def recurrent_specs(*, pipe: str | None = None, tensor: str | None = None) -> RecurrentState[PartitionSpec]:
    """The same of what is in no page: layers and key heads."""
    state = PartitionSpec(pipe, None, tensor)
    return RecurrentState(state, state)


@dataclass(frozen=True)
class RecurrentShape:
    """What a layer keeps of a sequence; all numbers are those of all devices together."""

    num_layers: int
    num_slots: int
    num_key_heads: int
    values_per_key: int
    """Value heads that share a key head."""
    key_dim: int
    value_dim: int
    conv_width: int
    dtype: jnp.dtype
    """Of the convolution's inputs."""

    @property
    def num_channels(self) -> int:
        """Of a key head: query, key and values."""
        return 2 * self.key_dim + self.values_per_key * self.value_dim

    def abstract(self, mesh: Mesh) -> RecurrentState[jax.ShapeDtypeStruct]:
        """The state, divided over ``mesh`` as the cache is."""
        pipe = "pipe" if mesh.shape["pipe"] > 1 else None
        sharding = NamedSharding(mesh, recurrent_specs(pipe=pipe, tensor="tensor").memory)
        lead = self.num_layers, self.num_slots, self.num_key_heads
        inputs = (*lead, self.num_channels, self.conv_width - 1)
        memory = (*lead, self.values_per_key, self.key_dim, self.value_dim)
        return RecurrentState(
            jax.ShapeDtypeStruct(inputs, self.dtype, sharding=sharding),
            jax.ShapeDtypeStruct(memory, jnp.float32, sharding=sharding),
        )


@dataclass(frozen=True)
class KVCacheShape:
    """What a sequence's keys and values are; all numbers are those of all devices together."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    """As stored."""
    recurrent: RecurrentShape | None = None
    has_values: bool = True
    """Whether they lie apart from keys; without, a key is its own value."""

    @property
    def num_arrays(self) -> int:
        """Of KVCache.pages."""
        return 2 if self.has_values else 1

    @property
    def block_bytes(self) -> int:
        """Of a block, which is a page of every layer, its keys and its values."""
        return self.num_arrays * math.prod(self.pages_shape(1)) * self.dtype.itemsize

    def pages_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        """Of the keys, and of the values, with ``num_pages`` in each layer."""
        return self.num_layers * num_pages, self.page_size, self.num_kv_heads, self.head_dim

    def abstract(self, num_pages: int, mesh: Mesh) -> KVCache[jax.ShapeDtypeStruct]:
        """The cache of ``num_pages`` in each layer, divided over ``mesh``: over its stages and over its KV heads.

        A stage has the pages of its own layers, as if there were no others.
        """
        pipe = "pipe" if mesh.shape["pipe"] > 1 else None
        specs = cache_specs(pipe=pipe, tensor="tensor")
        pages, scales = (NamedSharding(mesh, spec) for spec in (specs.k, specs.scales))
        array = jax.ShapeDtypeStruct(self.pages_shape(num_pages), self.dtype, sharding=pages)
        return KVCache(
            k=array,
            v=array if self.has_values else None,
            scales=jax.ShapeDtypeStruct((self.num_layers, self.num_arrays), jnp.float32, sharding=scales),
            recurrent=None if self.recurrent is None else self.recurrent.abstract(mesh),
        )

    def besides_pages(self, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
        """What takes memory whatever the number of pages."""
        return [] if self.recurrent is None else list(self.recurrent.abstract(mesh))

    def abstract_block(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """Of a block by itself, ``[2, layers, page_size, kv_heads, head_dim]``: keys, then values; ``[1, ...]`` where
        keys are values."""
        shape = (self.num_arrays, *self.pages_shape(1))
        sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor"))
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)

    def blocks_of(self, cache: KVCache[jax.Array], numbers: jax.Array) -> list[jax.Array]:
        """The blocks ``numbers`` ``int32[n]`` of a cache that is in one stage, as ``abstract_block`` has them."""
        pages = [self._by_layer(array) for array in cache.pages]
        return [jnp.stack([dynamic_index_in_dim(x, number, 1, keepdims=False) for x in pages]) for number in numbers]

    def with_blocks(
        self, cache: KVCache[jax.Array], numbers: jax.Array, blocks: Sequence[jax.Array]
    ) -> KVCache[jax.Array]:
        """The cache with these as its blocks ``numbers``; in place where it is donated."""
        # All in one: XLA changes a CPU's cache in place then, and copies it for one after the other.
        changed = zip(cache.pages, jnp.stack(blocks, axis=2), strict=True)
        return cache.with_pages(
            [self._by_layer(pages).at[:, numbers].set(new).reshape(pages.shape) for pages, new in changed]
        )

    def _by_layer(self, pages: jax.Array) -> jax.Array:
        return pages.reshape(self.num_layers, -1, *pages.shape[1:])

    def zeros(self, num_pages: int, mesh: Mesh, scales: np.ndarray | None = None) -> KVCache[jax.Array]:
        """The same of no sequences, made on the devices: the host may not have as much memory.

        scales: ``float32[layers, 2]``, of keys and of values; 1 by default.
        """
        abstract = self.abstract(num_pages, mesh)
        made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
        values = np.ones(abstract.scales.shape, np.float32) if scales is None else scales[:, : self.num_arrays]
        placed = jax.make_array_from_callback(values.shape, abstract.scales.sharding, lambda index: values[index])
        return made._replace(scales=placed)
