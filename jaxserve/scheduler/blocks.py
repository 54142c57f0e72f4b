"""Paged KV bookkeeping on the host: which block of the cache belongs to which sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.scheduler.prefix_cache import Hit, PrefixCache, block_digests
from jaxserve.scheduler.swap_space import Copy, SwapSpace

if TYPE_CHECKING:
    from jaxserve.request import Request


class BlockManager:
    """Hands out KV blocks of ``block_size`` tokens. Block 0 is the dummy page of padding rows: nobody gets it.

    A sequence goes by its slot, below ``max_num_seqs``, and has at most ``max_model_len`` tokens.

    With ``prefix_caching``, sequences of requests that begin alike share the full blocks of their beginnings, which
    nobody writes to again, and a block outlives its sequences until it is wanted for other tokens. ``window``: the
    widest attention window, where every layer has one. ``swap_space``: where there is one, what such a block held goes
    there, and who looks for it gets it back; ``take_copies`` says what that takes.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        *,
        window: int | None = None,
        prefix_caching: bool = False,
        swap_space: SwapSpace | None = None,
    ) -> None:
        import numpy as np  # who only configures a scheduler, or asks for help, need not wait for it

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        """By slot, the sequence's blocks in the order of its tokens, then zeros; 0 as well for those that
        ``release_before`` took back."""
        self.held_tokens = [0] * max_num_seqs
        """By slot, how many tokens its blocks are for, those that ``release_before`` took back included."""
        self.num_repeats = 0
        """Blocks that the tables hold more than once, each time after the first counted."""
        self._num_released = [0] * max_num_seqs
        """By slot, how many blocks ``release_before`` took back: the first ones."""
        self._free = list(range(num_blocks - 1, 0, -1))
        """What nobody can find; ``_cache`` has the others that no sequence has."""
        self._num_owners = [0] * num_blocks
        self._cache = PrefixCache(block_size, window)
        self._prefix_caching = prefix_caching
        self.swap_space = swap_space
        self._requests: list[Request | None] = [None] * max_num_seqs
        """By slot, whose blocks others may find."""
        self._num_shown = [0] * max_num_seqs
        """By slot, how many blocks ``show`` has gone through."""

    @property
    def num_free(self) -> int:
        """Blocks that no sequence has, those in the prefix cache included."""
        return len(self._free) + self._cache.num_idle

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks in use, in [0, 1]."""
        return self.num_used / (self.num_blocks - 1)

    def num_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def num_held(self, slot: int) -> int:
        """Blocks that the sequence has, without those that ``release_before`` took back."""
        return self.held_tokens[slot] // self.block_size - self._num_released[slot]

    def num_in_use(self, hit: Hit) -> int:
        """Blocks of the hit that running sequences have, so that they are not taken from the free ones."""
        return sum(self._num_owners[block] > 0 for block in hit.blocks)

    def room(self, slot: int) -> int:
        """Tokens that the sequence's own blocks and all free ones could hold together."""
        return self.held_tokens[slot] + self.num_free * self.block_size

    def find(self, request: Request) -> Hit:
        """What the cache has of a request that waits."""
        if not self._prefix_caching:
            return Hit(0, [])
        hit = self._cache.find(request)
        return hit if self.swap_space is None else self._with_swapped(request, hit, self.swap_space)

    def admit(self, slot: int, request: Request, hit: Hit) -> None:
        """Begin a request's sequence with what ``find`` has just found for it."""
        for block in hit.blocks:
            if self._num_owners[block]:
                self.num_repeats += 1
            else:
                self._cache.wake(block)
            self._num_owners[block] += 1
        end = hit.num_tokens // self.block_size
        first = end - len(hit.blocks) - len(hit.swapped)
        self.tables[slot, first:end] = [*hit.blocks, *self._swap_in(hit.swapped)]
        self.held_tokens[slot] = hit.num_tokens
        self._num_released[slot], self._num_shown[slot] = first, end
        if self._prefix_caching:
            self._requests[slot] = request

    def grow(self, slot: int, num_tokens: int) -> None:
        """Give the sequence blocks for its first ``num_tokens`` tokens; the caller has checked ``room``."""
        held = self.held_tokens[slot] // self.block_size
        wanted = self.num_for(num_tokens)
        if wanted <= held:
            return
        if wanted - held > self.num_free:
            raise RuntimeError(f"{wanted - held} KV blocks wanted for slot {slot}, {self.num_free} free")
        self.tables[slot, held:wanted] = self._take(wanted - held)
        self.held_tokens[slot] = wanted * self.block_size

    def show(self, slot: int, num_tokens: int) -> None:
        """Let other requests find the sequence's full blocks below token ``num_tokens``.

        These tokens must have been computed, or be in the batch that is launched next: the device runs batches in
        order, and within one each layer writes the rows of all requests before it attends. So who finds a block may be
        in the same batch. Tokens that the host does not know yet are left for later.
        """
        request = self._requests[slot]
        if request is None:
            return
        first, end = self._num_shown[slot], min(num_tokens, request.num_known_tokens) // self.block_size
        if end > first:
            digests = block_digests(request, end, self.block_size)
            for block, digest in zip(self.tables[slot, first:end].tolist(), digests[first:end], strict=True):
                if block:  # not where it has left the window before its last token was known
                    self._cache.add(block, digest)
            self._num_shown[slot] = end

    def release_before(self, slot: int, num_tokens: int) -> None:
        """Take back the sequence's whole blocks below token ``num_tokens``, which its next tokens do not read.

        Their table entries become 0, so that the others stay where the positions expect them.
        """
        first, end = self._num_released[slot], min(num_tokens, self.held_tokens[slot]) // self.block_size
        if end > first:
            self._take_back(slot, first, end)
            self._num_released[slot] = end

    def release(self, slot: int) -> None:
        """Take all blocks of the sequence back."""
        self._take_back(slot, self._num_released[slot], self.held_tokens[slot] // self.block_size)
        self.held_tokens[slot] = self._num_released[slot] = self._num_shown[slot] = 0
        self._requests[slot] = None

    def take_copies(self) -> list[Copy]:
        """What is to be copied between cache and swap space, one after the other, before the next step is launched."""
        return [] if self.swap_space is None else self.swap_space.take_copies()

    def check(self) -> None:
        """Prove that every block is free or in as many tables as it is counted for; raises RuntimeError otherwise."""
        entries = self.tables[self.tables > 0].tolist()
        used, free = set(entries), [*self._free, *self._cache.idle_blocks()]
        num_owners = [0] * self.num_blocks
        for block in entries:
            num_owners[block] += 1
        balanced = sorted([*used, *free]) == list(range(1, self.num_blocks))
        if not balanced or num_owners != self._num_owners or self.num_repeats != len(entries) - len(used):
            raise RuntimeError(
                f"KV blocks do not balance: {len(free)} free + {len(used)} used of {self.num_blocks - 1}"
            )

    def _take(self, number: int) -> list[int]:
        """Free blocks, for one sequence; those of the prefix cache last."""
        first = max(0, len(self._free) - number)
        taken = self._free[first:][::-1]
        del self._free[first:]
        while len(taken) < number:
            block, digest = self._cache.evict()
            if self.swap_space is not None:
                self.swap_space.put(digest, block)
            taken.append(block)
        for block in taken:
            self._num_owners[block] = 1
        return taken

    def _with_swapped(self, request: Request, hit: Hit, swap_space: SwapSpace) -> Hit:
        """And what comes after it in the swap space, as far as there are blocks to copy it to."""
        first, most = hit.num_tokens // self.block_size, request.num_cacheable_tokens // self.block_size
        room = self.num_free - (len(hit.blocks) - self.num_in_use(hit))
        last = min(most, first + min(room, swap_space.max_blocks_at_once))
        found = list[bytes]()
        for index in range(first, last):
            digest = block_digests(request, index + 1, self.block_size)[index]
            if digest not in swap_space:
                break
            found.append(digest)
        return Hit(hit.num_tokens + len(found) * self.block_size, hit.blocks, found)

    def _swap_in(self, digests: Sequence[bytes]) -> list[int]:
        """Blocks that have what is in the swap space now."""
        if not digests:
            return []
        assert self.swap_space is not None
        # Claimed first: what leaves the cache to make room must not take their places.
        places = [self.swap_space.claim(digest) for digest in digests]
        blocks = self._take(len(digests))
        for digest, place, block in zip(digests, places, blocks, strict=True):
            self.swap_space.copy_back(place, block)
            self._cache.add(block, digest)
        return blocks

    def _take_back(self, slot: int, first: int, end: int) -> None:
        """A sequence's last blocks become free before its first ones: those are what others will look for."""
        if (request := self._requests[slot]) is not None:
            # What a decode adds is shown only now: while it runs hardly anybody has the same output.
            self.show(slot, request.num_computed_tokens)
        blocks = self.tables[slot, first:end]
        for block in blocks[::-1].tolist():
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                self.num_repeats -= 1
            elif not self._cache.keep(block):
                self._free.append(block)
        blocks.fill(0)
