"""Paged KV bookkeeping on the host: which block of the cache belongs to which sequence."""

from __future__ import annotations


class BlockManager:
    """Hands out KV blocks of ``block_size`` tokens. Block 0 is the dummy page of padding rows: nobody gets it.

    A sequence goes by its slot, below ``max_num_seqs``, and has at most ``max_model_len`` tokens.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int) -> None:
        import numpy as np  # who only configures a scheduler, or asks for help, need not wait for it

        self.num_blocks = num_blocks
        self.block_size = block_size
        self.tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        """By slot, the sequence's blocks in the order of its tokens, then zeros; 0 as well for those that
        ``release_before`` took back."""
        self.held_tokens = [0] * max_num_seqs
        """By slot, how many tokens its blocks are for, those that ``release_before`` took back included."""
        self._num_released = [0] * max_num_seqs
        """By slot, how many blocks ``release_before`` took back: the first ones."""
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

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

    def room(self, slot: int) -> int:
        """Tokens that the sequence's own blocks and all free ones could hold together."""
        return self.held_tokens[slot] + len(self._free) * self.block_size

    def grow(self, slot: int, num_tokens: int) -> None:
        """Give the sequence blocks for its first ``num_tokens`` tokens; the caller has checked ``room``."""
        held = self.held_tokens[slot] // self.block_size
        wanted = self.num_for(num_tokens)
        if wanted <= held:
            return
        if wanted - held > len(self._free):
            raise RuntimeError(f"{wanted - held} KV blocks wanted for slot {slot}, {len(self._free)} free")
        first = len(self._free) - (wanted - held)
        self.tables[slot, held:wanted] = self._free[first:][::-1]
        del self._free[first:]
        self.held_tokens[slot] = wanted * self.block_size

    def release_before(self, slot: int, num_tokens: int) -> None:
        """Take back the sequence's whole blocks below token ``num_tokens``, which nothing will read again.

        Their table entries become 0, so that the others stay where the positions expect them.
        """
        first, end = self._num_released[slot], min(num_tokens, self.held_tokens[slot]) // self.block_size
        if end > first:
            self._take_back(slot, first, end)
            self._num_released[slot] = end

    def release(self, slot: int) -> None:
        """Take all blocks of the sequence back."""
        self._take_back(slot, self._num_released[slot], self.held_tokens[slot] // self.block_size)
        self.held_tokens[slot] = self._num_released[slot] = 0

    def check(self) -> None:
        """Prove that every block is free or belongs to exactly one sequence; raises RuntimeError otherwise."""
        owned = self.tables[self.tables > 0].tolist()
        if sorted(owned + self._free) != list(range(1, self.num_blocks)):
            raise RuntimeError(
                f"KV blocks do not balance: {len(self._free)} free + {len(owned)} used of {self.num_blocks - 1}"
            )

    def _take_back(self, slot: int, first: int, end: int) -> None:
        blocks = self.tables[slot, first:end]
        self._free += blocks[::-1].tolist()
        blocks.fill(0)
