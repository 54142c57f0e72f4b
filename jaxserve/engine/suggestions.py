"""Drafts that the host proposes, for the device to take up where its newest tokens are those that were expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from jaxserve.config import ResolvedConfig
from jaxserve.drafting import Suggestion
from jaxserve.engine.edits import EditedRequests
from jaxserve.engine.speculation import most_suggested, no_suggestions, suggestions_of
from jaxserve.engine.suffixes import SuffixProposer
from jaxserve.request import Request, RequestStatus
from jaxserve.scheduler import Chunk


class HostProposer(Protocol):
    """Follows the requests of an engine."""

    def propose(self, request: Request, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow those that are known."""

    def discard(self, request: Request) -> None:
        """It has ended."""


PROPOSERS: dict[str, Callable[[ResolvedConfig], HostProposer]] = {
    "suffix": lambda config: SuffixProposer(config.suffix_decoding_max_cached_tokens)
}
"""By the option ``speculative``."""


class Suggester:
    """Of one engine: what a grammar leaves no choice about, or else what a proposer says, if there is one."""

    def __init__(self, config: ResolvedConfig, edited: EditedRequests) -> None:
        self._most_drafts, self._max_num_seqs = config.max_seq_drafts, config.max_num_seqs
        self._edited = edited
        make = PROPOSERS.get(config.speculative)
        self._proposer = None if make is None else make(config)

    def follow(self, chunks: Iterable[Chunk]) -> None:
        """Suggest what follows the tokens that are known now, to those of a step that draw, have just been sampled, and
        have not ended."""
        if self._most_drafts:
            for chunk in chunks:
                if chunk.samples and chunk.request.status is not RequestStatus.FINISHED:
                    self._suggest(chunk.request, most_suggested(self._most_drafts))

    def discard(self, request: Request) -> None:
        """It has ended."""
        if self._proposer is not None:
            self._proposer.discard(request)

    def pack(self, chunks: Iterable[Chunk]) -> np.ndarray | None:
        """``int32[S, 2 + N]``: what is suggested to those that have rows for drafts; None if that is nobody."""
        asked = [chunk for chunk in chunks if chunk.num_drafts and chunk.request.suggestion is not None]
        if not asked:
            return None
        packed = no_suggestions(self._max_num_seqs, self._most_drafts)
        starts, counts, token_ids = suggestions_of(packed)
        for chunk in asked:
            assert chunk.request.suggestion is not None
            start, suggestion = chunk.request.suggestion
            starts[chunk.slot], counts[chunk.slot] = start, len(suggestion)
            token_ids[chunk.slot, : len(suggestion)] = suggestion
        return packed

    def _suggest(self, request: Request, most: int) -> None:
        token_ids = self._edited.forced(request)
        if not token_ids and self._proposer is not None:
            token_ids = self._proposer.propose(request, most)
        if token_ids is not None:
            request.suggestion = Suggestion(request.num_known_tokens, token_ids[:most])
