"""What the policies share that prefill in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

from jaxserve.request import Request
from jaxserve.scheduler.base import Scheduler
from jaxserve.scheduler.batch import Batch


class ChunkedPrefillScheduler(Scheduler):
    """A prompt is cut into chunks wherever a batch is full; its blocks are taken chunk by chunk, once all are free."""

    def _chunk_tokens(self, batch: Batch, request: Request) -> int:
        """How many tokens of the request's prefill ``batch`` may take."""
        return min(request.num_uncomputed_tokens, batch.budget_left)

    def _grant_chunks(self, batch: Batch) -> None:
        """Prefills under way, then new requests, in what is left of the budget.

        Prefills under way leave the other clients that have some, or whose turn it is, their shares of it: so one
        client's long prompt does not hold up another's short one until it has been computed.
        """
        shares = self._client_shares(batch)
        for request in batch.prefill_candidates:
            num_tokens = self._chunk_tokens(batch, request)
            if shares:
                num_tokens = min(num_tokens, shares[request.client])
                shares[request.client] -= num_tokens
            self._grant(batch, request, num_tokens)
        while (waiting := self._next_waiting(batch)) is not None and self._has_room(batch, waiting):
            num_tokens = self._chunk_tokens(batch, waiting)
            if num_tokens <= 0:
                break
            self._admit(batch, waiting)
            self._grant(batch, waiting, num_tokens)

    def _client_shares(self, batch: Batch) -> dict[str, int]:
        """Tokens for each client's prefills; empty where there is but one client."""
        requests, head = list(batch.prefill_candidates), self.waiting.head()
        if requests and head is not None and head.client != requests[0].client and self._next_waiting(batch) is head:
            requests += [head] if self._has_room(batch, head) else []
        claims = dict.fromkeys((request.client for request in requests), 0)
        if len(claims) < 2:
            return {}
        budget, limited = batch.budget_left, list[int]()
        for request in requests:
            claims[request.client] += request.num_uncomputed_tokens
            if (most := self._chunk_tokens(batch, request)) < request.num_uncomputed_tokens:
                limited.append(most)
        return fair_shares(max(limited, default=budget), claims)


def fair_shares(budget: int, claims: Mapping[str, int]) -> dict[str, int]:
    """Of a budget by client, as near to one another as their ``claims`` allow: max-min fairness (Bertsekas and
    Gallager, Data Networks, 1992)."""
    shares, left = dict[str, int](), budget
    for number, (client, claim) in enumerate(sorted(claims.items(), key=itemgetter(1))):
        shares[client] = min(claim, -(-left // (len(claims) - number)))
        left -= shares[client]
    return shares
