"""Paged KV bookkeeping on the host: which block of the cache belongs to which request."""

from __future__ import annotations


class BlockManager:
    """Hands out KV blocks of ``block_size`` tokens. Block 0 is the dummy page of padding rows: nobody gets it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, 0, -1))
        self._tables: dict[str, list[int]] = {}

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

    def table(self, request_id: str) -> list[int]:
        """The request's blocks, in the order of its tokens; 0 where ``release_before`` took one back."""
        return self._tables.get(request_id, [])

    def room(self, request_id: str) -> int:
        """Tokens that the request's own blocks and all free ones could hold together."""
        return (len(self.table(request_id)) + len(self._free)) * self.block_size

    def grow(self, request_id: str, num_tokens: int) -> None:
        """Give the request blocks for its first ``num_tokens`` tokens; the caller has checked ``room``."""
        table = self._tables.setdefault(request_id, [])
        missing = -(-num_tokens // self.block_size) - len(table)
        if missing > len(self._free):
            raise RuntimeError(f"{missing} KV blocks wanted for {request_id!r}, {len(self._free)} free")
        for _ in range(missing):
            table.append(self._free.pop())

    def release_before(self, request_id: str, num_tokens: int) -> None:
        """Take back the request's whole blocks below token ``num_tokens``, which nothing will read again.

        Their table entries become 0, so that the others stay where the positions expect them.
        """
        table = self.table(request_id)
        for index in range(min(num_tokens // self.block_size, len(table)) - 1, -1, -1):
            if table[index] == 0:  # and so are those before it
                break
            self._free.append(table[index])
            table[index] = 0

    def release(self, request_id: str) -> None:
        """Take all blocks of the request back."""
        self._free.extend(block for block in reversed(self._tables.pop(request_id, [])) if block)

    def check(self) -> None:
        """Prove that every block is free or belongs to exactly one request; raises RuntimeError otherwise."""
        owned = [block for table in self._tables.values() for block in table if block]
        everything = sorted(owned + self._free)
        if everything != list(range(1, self.num_blocks)):
            raise RuntimeError(
                f"KV blocks do not balance: {len(self._free)} free + {len(owned)} used of {self.num_blocks - 1}"
            )
