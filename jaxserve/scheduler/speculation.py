"""Which requests get drafts, and how many: what the budget leaves, as long as tokens come faster with them."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

from jaxserve.request import Request
from jaxserve.scheduler.batch import Batch
from jaxserve.scheduler.blocks import BlockManager
from jaxserve.scheduler.step_time import BatchShape, Pace


def most_step_drafts(num_speculative_tokens: int, max_num_seqs: int) -> int:
    """Drafts that a step has room for: few sequences get all they may, many get two each."""
    return min(max_num_seqs * num_speculative_tokens, max(num_speculative_tokens, 2 * max_num_seqs))


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Drafts are rows behind a decode, each a guess of the token there; those that hold are tokens that a step gains.

    A step computes drafts in rows that nobody else wants, the likeliest ones, and so many that the batch's expected
    tokens per second are most (the goodput of arXiv 2406.14066). That the j-th of a request holds is as likely as that
    all before it do: its acceptance to the power of j.
    """

    num_speculative_tokens: int
    """Most drafts of one sequence in a step."""
    max_drafts: int
    """Most drafts in a step: programs have room for these."""
    num_ahead: int = 0
    """Tokens behind those that a step may make, whose keys a draft model keeps as it proposes them."""
    pace: Pace | None = None
    """Without it, rows cost nothing."""

    @property
    def absent_cost_nothing(self) -> bool:
        """Whether rows are free that were granted for drafts which nobody had: then those tell nothing."""
        return self.pace is None or self.pace.step_time.interpolates

    def grant(self, batch: Batch, blocks: BlockManager, num_running: int) -> None:
        """Lengthen the batch's decodes by drafts.

        Nobody is preempted for them: as many blocks stay free as there are requests running, and a request has room for
        the token behind its drafts.
        """
        likeliest = self._likeliest(batch, min(batch.budget_left, self.max_drafts))
        numbers = Counter(
            request.request_id for request, _ in likeliest[: self._most_useful(batch.num_tokens, likeliest)]
        )
        for request in batch.decode_candidates:
            number = numbers[request.request_id]
            if number:
                chunk = batch.chunks[request.request_id]
                spare = max(0, blocks.num_free - num_running) * blocks.block_size
                room = blocks.held_tokens[chunk.slot] + spare
                number = max(0, min(number, room - chunk.start - 2))
            if number == 0:
                request.acceptance.fade()
                continue
            ahead = chunk.start + number + 2 + self.num_ahead
            blocks.grow(chunk.slot, min(ahead, room, request.num_prompt_tokens + request.max_tokens))
            batch.add(chunk._replace(num_tokens=1 + number, num_drafts=number))
            batch.num_tokens -= chunk.num_tokens

    def _likeliest(self, batch: Batch, most: int) -> list[tuple[Request, float]]:
        """At most so many drafts, each with how likely it is to hold, in that order."""
        waiting: list[tuple[float, tuple[float, int], int, Request]] = []
        for request in batch.decode_candidates:
            chunk = batch.chunks.get(request.request_id)
            if chunk is not None and request.may_draft and (left := self._most(request, chunk.start)) > 0:
                waiting.append((-request.acceptance.rate, request.rank, left, request))
        heapq.heapify(waiting)
        found: list[tuple[Request, float]] = []
        while waiting and len(found) < most:
            value, rank, left, request = waiting[0]
            found.append((request, -value))
            if left > 1:
                heapq.heapreplace(waiting, (value * request.acceptance.rate, rank, left - 1, request))
            else:
                heapq.heappop(waiting)
        return found

    def _most_useful(self, num_rows: int, drafts: list[tuple[Request, float]]) -> int:
        """How many of the first drafts make the most tokens per second of a batch of ``num_rows`` besides."""
        if self.pace is None:
            return len(drafts)
        tokens, best, best_number = float(num_rows), 0.0, 0
        for number, value in enumerate([0.0, *(value for _, value in drafts)]):
            tokens += value
            seconds = self.pace.step_time.predict(BatchShape(num_rows + number))
            if number and seconds > self.pace.step_seconds:
                break
            if tokens / seconds > best:
                best, best_number = tokens / seconds, number
        return best_number

    def _most(self, request: Request, start: int) -> int:
        """Drafts that there may be, and that could become tokens which the request may still make."""
        asked = request.params.num_speculative_tokens
        most = self.num_speculative_tokens if asked is None else min(asked, self.num_speculative_tokens)
        if request.suggestion is not None:
            most = min(most, request.suggestion.start + len(request.suggestion.token_ids) - request.num_tokens)
        return min(most, request.num_prompt_tokens + request.max_tokens - start - 2)
