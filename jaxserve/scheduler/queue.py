"""Who waits, and whose turn it is."""

from __future__ import annotations

from collections import OrderedDict
from operator import attrgetter

from jaxserve.request import Request

AGEING_SECONDS = 10.0
"""What one level of priority is worth: so much longer the less urgent request has to wait to go first."""
by_rank = attrgetter("rank")


class WaitingQueue:
    """Requests in the order of their ranks: when they came, later by ``AGEING_SECONDS`` for each level of priority.

    That is the order of priorities that fall by a level in ``AGEING_SECONDS`` of waiting: they fall for all alike, so
    it never changes. Nobody starves, for only those overtake a request who come within ``AGEING_SECONDS`` for each
    level that they are more urgent. Requests of one priority keep the order in which they were added.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[str, Request]] = {}
        """By priority, those that wait, each in the order of ranks."""
        self._latest_seconds, self._num_added = float("-inf"), 0

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def add(self, request: Request) -> None:
        """A request that is new; one that comes late, with an earlier time of arrival, goes behind those before it."""
        self._latest_seconds = max(self._latest_seconds, request.metrics.arrival_seconds)
        self._num_added += 1
        request.rank = self._latest_seconds + AGEING_SECONDS * request.params.priority, self._num_added
        self._level(request)[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """A request that had its turn already: before all others of its priority, since those who wait came later."""
        level = self._level(request)
        level[request.request_id] = request
        level.move_to_end(request.request_id, last=False)

    def head(self) -> Request | None:
        """Whose turn it is."""
        heads = (next(iter(level.values())) for level in self._levels.values())
        return min(heads, key=by_rank, default=None)

    def remove(self, request: Request) -> None:
        """Take a request out, if it waits."""
        level = self._level(request)
        level.pop(request.request_id, None)
        if not level:
            del self._levels[request.params.priority]

    def _level(self, request: Request) -> OrderedDict[str, Request]:
        return self._levels.setdefault(request.params.priority, OrderedDict())
