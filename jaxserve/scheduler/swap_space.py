"""Which KV blocks lie in the host's memory, so that they are copied back instead of computed anew."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple


class Copy(NamedTuple):
    """Of a block of the KV cache to its place in the swap space, or back."""

    block: int
    place: int
    is_out: bool
    """Whether the block leaves the cache."""


class SwapSpace:
    """The blocks that had to leave the prefix cache, by the digests of their tokens; what nobody has wanted for longest
    has to leave the swap space too. A block that is copied back leaves it: it is in the cache again.

    ``max_blocks_at_once``: the most that is copied back before one step, which waits for it.
    """

    def __init__(self, num_places: int, max_blocks_at_once: int) -> None:
        self.max_blocks_at_once = max_blocks_at_once
        self._places = OrderedDict[bytes, int]()
        self._free = list(range(num_places - 1, -1, -1))
        self._copies: list[Copy] = []

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __len__(self) -> int:
        return len(self._places)

    def put(self, digest: bytes, block: int) -> None:
        """Keep what the block holds."""
        if digest in self._places:
            self._places.move_to_end(digest)
            return
        if not self._free and not self._places:  # all places are claimed
            return
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        self._places[digest] = place
        self._copies.append(Copy(block, place, is_out=True))

    def claim(self, digest: bytes) -> int:
        """The place of what was kept, which stays there until it has been copied back."""
        return self._places.pop(digest)

    def copy_back(self, place: int, block: int) -> None:
        """Fill the block from a claimed place."""
        self._free.append(place)
        self._copies.append(Copy(block, place, is_out=False))

    def take_copies(self) -> list[Copy]:
        """What is to be copied, one after the other, before the next step is launched."""
        copies, self._copies = self._copies, []
        return copies
