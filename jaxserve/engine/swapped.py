"""The blocks of the KV cache that lie in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxserve.kernels.cache import Block

PINNED = "pinned_host"
"""Jax's word for the host's memory that devices copy from and to by themselves."""


class SwappedBlocks:
    """Contents of blocks, by their places in the swap space. Copies run after what the devices do already, and nobody
    waits for them here. ``abstract``: of a block on the devices."""

    def __init__(self, abstract: Sequence[jax.ShapeDtypeStruct]) -> None:
        self._here = tuple(array.sharding for array in abstract)
        self._pinned = tuple(sharding.with_memory_kind(PINNED) for sharding in self._here)
        self._blocks: dict[int, Block] = {}

    def keep(self, places: Sequence[int], blocks: Sequence[Block]) -> None:
        """Copy blocks from the devices to these places; those past the last place are of no use."""
        kept = jax.device_put(list(blocks[: len(places)]), [self._pinned] * len(places))
        self._blocks.update(zip(places, kept, strict=True))

    def clear(self) -> None:
        """Give the memory back."""
        self._blocks.clear()

    def fetch(self, places: Sequence[int], number: int) -> list[Block]:
        """Copies on the devices of what is in these places, and of the last one again and again up to ``number``."""
        found = jax.device_put([self._blocks[place] for place in places], [self._here] * len(places))
        return found + found[-1:] * (number - len(found))
