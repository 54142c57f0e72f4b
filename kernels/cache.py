"""What the devices keep of sequences: its shape, type and bytes, how it lies on a mesh, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    local: KVCache[Array] | None = None
    """Of the layers with a window, where their keys and values are of another shape: as many pages, which blocks count
    as they do those of the other layers."""

    @property
    def pages(self) -> tuple[Array, ...]:
        """The arrays of pages: the first has the keys, the last the values."""
        return (self.k,) if self.v is None else (self.k, self.v)

    def with_pages(self, pages: Sequence[Array]) -> KVCache[Array]:
        """The cache with these as its ``pages``."""
        return self._replace(k=pages[0], v=None if self.v is None else pages[1])

    def part(self, local: bool) -> KVCache[Array]:
        """By itself what a layer of either kind reads and writes."""
        part = self.local if local else self
        assert part is not None
        return part._replace(recurrent=None, local=None)

    def with_part(self, local: bool, part: KVCache[Array]) -> KVCache[Array]:
        return self._replace(local=part) if local else part._replace(recurrent=self.recurrent, local=self.local)


Block = tuple[jax.Array, ...]
"""A block by itself: keys, then values, ``[2, layers, page_size, kv_heads, head_dim]``, of each part of a cache."""


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
    local: KVCacheShape | None = None
    """Of the layers with a window, where theirs is another."""

    @property
    def parts(self) -> Sequence[KVCacheShape]:
        """By ``local``."""
        return (self,) if self.local is None else (self, self.local)

    @property
    def num_arrays(self) -> int:
        """Of KVCache.pages."""
        return 2 if self.has_values else 1

    @property
    def block_bytes(self) -> int:
        """Of a block, which is a page of every layer, its keys and its values."""
        return sum(part.num_arrays * math.prod(part.pages_shape(1)) * part.dtype.itemsize for part in self.parts)

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
            local=None if self.local is None else self.local.abstract(num_pages, mesh),
        )

    def besides_pages(self, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
        """What takes memory whatever the number of pages."""
        return [] if self.recurrent is None else list(self.recurrent.abstract(mesh))

    def abstract_block(self, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of a Block."""
        sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor"))
        return tuple(
            jax.ShapeDtypeStruct((part.num_arrays, *part.pages_shape(1)), part.dtype, sharding=sharding)
            for part in self.parts
        )

    def blocks_of(self, cache: KVCache[jax.Array], numbers: jax.Array) -> list[Block]:
        """The blocks ``numbers`` ``int32[n]`` of a cache that is in one stage."""
        found = [(shape, cache.part(bool(local))) for local, shape in enumerate(self.parts)]
        arrays = [[shape._by_layer(pages) for pages in part.pages] for shape, part in found]
        return [
            tuple(jnp.stack([dynamic_index_in_dim(x, number, 1, keepdims=False) for x in pages]) for pages in arrays)
            for number in numbers
        ]

    def with_blocks(self, cache: KVCache[jax.Array], numbers: jax.Array, blocks: Sequence[Block]) -> KVCache[jax.Array]:
        """The cache with these as its blocks ``numbers``; in place where it is donated."""
        for local, (shape, of_part) in enumerate(zip(self.parts, zip(*blocks, strict=True), strict=True)):
            part = cache.part(bool(local))
            # All in one: XLA changes a CPU's cache in place then, and copies it for one after the other.
            changed = zip(part.pages, jnp.stack(of_part, axis=2), strict=True)
            part = part.with_pages(
                [shape._by_layer(pages).at[:, numbers].set(new).reshape(pages.shape) for pages, new in changed]
            )
            cache = cache.with_part(bool(local), part)
        return cache

    def _by_layer(self, pages: jax.Array) -> jax.Array:
        return pages.reshape(self.num_layers, -1, *pages.shape[1:])

    def zeros(self, num_pages: int, mesh: Mesh, scales: Sequence[np.ndarray] = ()) -> KVCache[jax.Array]:
        """The same of no sequences, made on the devices: the host may not have as much memory.

        scales: ``float32[layers, 2]`` of each part, of keys and of values; 1 by default.
        """
        abstract = replace(self, local=None).abstract(num_pages, mesh)
        made = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract)
        values = scales[0][:, : self.num_arrays] if scales else np.ones(abstract.scales.shape, np.float32)
        placed = jax.make_array_from_callback(values.shape, abstract.scales.sharding, lambda index: values[index])
        local = None if self.local is None else self.local.zeros(num_pages, mesh, scales[1:])
        return made._replace(scales=placed, local=local)
