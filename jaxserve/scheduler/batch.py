"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from jaxserve.request import Request


class Chunk(NamedTuple):
    """Tokens ``[start, start + num_tokens)`` of one request, computed in one step."""

    request: Request
    start: int
    """Of a decode behind drafts that nobody has verified yet, as far as it may be: all of them may hold."""
    num_tokens: int
    slot: int
    """The request's slot in this step; a preemption may take it away before the step's results are processed."""
    samples: bool
    """True when the chunk reaches the request's last token, so the step samples the next one."""
    num_drafts: int = 0
    """Of the tokens, the last ones: guesses, each of which holds if the one before is followed by it."""

    @property
    def num_draws(self) -> int:
        """Tokens that it samples, of which those behind a draft that does not hold are nobody's."""
        return 1 + self.num_drafts if self.samples else 0


@dataclass
class Batch:
    """One step's work: at most ``budget`` tokens."""

    budget: int
    decode_candidates: list[Request]
    """Running requests that are ready to decode, whether or not the batch has room for them."""
    prefill_candidates: list[Request]
    """Running requests with more to compute than one token after an output token, be they in the batch or not."""
    chunks: dict[str, Chunk] = field(default_factory=dict)
    """What the batch computes, by request id."""
    preempted: list[Request] = field(default_factory=list)
    num_tokens: int = 0
    """Of all chunks."""

    @property
    def budget_left(self) -> int:
        return self.budget - self.num_tokens

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.request.request_id] = chunk
        self.num_tokens += chunk.num_tokens

    def drop(self, request: Request) -> None:
        """Take the request's chunk out, if it has one."""
        chunk = self.chunks.pop(request.request_id, None)
        if chunk is not None:
            self.num_tokens -= chunk.num_tokens
