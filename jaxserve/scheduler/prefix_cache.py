"""Which KV blocks hold which tokens, so that a request finds what has been computed of its beginning already."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from jaxserve.request import Request


class Hit(NamedTuple):
    """What a request finds of its tokens in the cache."""

    num_tokens: int
    """They need not be computed: whole blocks of them, at most the request's ``num_cacheable_tokens``."""
    blocks: list[int]
    """Of these tokens, those that are in the cache. What comes before, if anything, has left the window."""
    swapped: Sequence[bytes] = ()
    """Of the blocks that follow them, which are in the swap space, the digests."""


def block_digests(request: Request, num_blocks: int, block_size: int) -> list[bytes]:
    """Of the request's first blocks, ``num_blocks`` at least, whose tokens the host must know.

    A digest stands for all tokens up to its block's end, and for the salt: equal digests, equal keys and values. What
    else they depend on, model and type of the cache, is one for all of an engine. The request keeps its digests: each
    is computed once.
    """
    digests = request.block_digests
    if len(digests) < num_blocks:
        tokens = array("i", request.known_token_ids(len(digests) * block_size, num_blocks * block_size))
        # A string from JSON may hold half of a surrogate pair.
        salt = (request.params.cache_salt or "").encode(errors="surrogatepass")
        digest = digests[-1] if digests else sha256(salt).digest()
        for begin in range(0, len(tokens), block_size):
            digest = sha256(digest + tokens[begin : begin + block_size].tobytes()).digest()
            digests.append(digest)
    return digests


class PrefixCache:
    """The full blocks that can be found by their digests, and those of them that no sequence has: the idle ones.

    An idle block may be taken for other tokens at any time, the one that has been idle for longest first.
    """

    def __init__(self, block_size: int, window: int | None) -> None:
        self._block_size, self._window = block_size, window
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._idle = OrderedDict[int, None]()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, request: Request) -> Hit:
        """The most of the request's tokens whose blocks are there, as far as the window of the next one sees them."""
        found, num_in_row, num_hit = list[int](), 0, 0
        for index in range(request.num_cacheable_tokens // self._block_size):
            block = self._blocks.get(block_digests(request, index + 1, self._block_size)[index], 0)
            if not block and self._window is None:
                break
            found.append(block)
            num_in_row = num_in_row + 1 if block else 0
            if index + 1 - num_in_row <= self._first_seen(index + 1):
                num_hit = index + 1
        return Hit(num_hit * self._block_size, found[self._first_seen(num_hit) : num_hit])

    def add(self, block: int, digest: bytes) -> None:
        """Let a block be found, unless another with the same tokens is there."""
        if digest not in self._blocks:
            self._blocks[digest] = block
            self._digests[block] = digest

    def keep(self, block: int) -> bool:
        """A block has lost its last sequence. False where it cannot be found: it is of no use any more."""
        if block not in self._digests:
            return False
        self._idle[block] = None
        return True

    def wake(self, block: int) -> None:
        """An idle block has a sequence again."""
        del self._idle[block]

    def evict(self) -> tuple[int, bytes]:
        """Take the block that has been idle for longest, for other tokens. Also what those were that it has."""
        block, _ = self._idle.popitem(last=False)
        digest = self._digests.pop(block)
        del self._blocks[digest]
        return block, digest

    def idle_blocks(self) -> list[int]:
        return list(self._idle)

    def _first_seen(self, num_blocks: int) -> int:
        """The first block that the token after ``num_blocks`` full ones sees."""
        if self._window is None:
            return 0
        return max(0, num_blocks * self._block_size - self._window + 1) // self._block_size
