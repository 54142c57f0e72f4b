"""Who waits, and whose turn it is."""

from __future__ import annotations

from collections import OrderedDict
from operator import attrgetter

from jaxserve.request import Request

AGEING_SECONDS = 10.0
"""What one level of priority is worth: so much longer the less urgent request has to wait to go first."""
SECONDS_PER_TOKEN = 1e-3
"""How much later a client's next request counts as having come, for each token of this one's prompt."""
by_rank = attrgetter("rank")


class WaitingQueue:
    """Requests in the order of their ranks: when they came, later by ``AGEING_SECONDS`` for each level of priority.

    That is the order of priorities that fall by a level in ``AGEING_SECONDS`` of waiting: they fall for all alike, so
    it never changes. Requests of one priority keep the order in which they were added, but for those of clients that
    have names: each client's count as having come one after the other, ``SECONDS_PER_TOKEN`` apart for each token of a
    prompt. So whoever sends many long prompts stands in line behind who sends few and short ones (start-time fair
    queueing, Goyal et al., SIGCOMM 1996). Nobody starves, for ranks are given once, and time goes on: only those
    overtake a request who come before its rank.
    """

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], OrderedDict[str, Request]] = {}
        """By priority and client, those that wait, each in the order of ranks."""
        self._latest_seconds, self._num_added = float("-inf"), 0
        self._next_seconds: dict[str, float] = {}
        """By client, when its next request counts as having come at the earliest, where that is still to come."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, request: Request) -> None:
        """A request that is new; one that comes late, with an earlier time of arrival, goes behind those before it."""
        self._latest_seconds = max(self._latest_seconds, request.metrics.arrival_seconds)
        self._num_added += 1
        seconds = self._latest_seconds if not request.client else self._fair_seconds(request)
        request.rank = seconds + AGEING_SECONDS * request.params.priority, self._num_added
        self._line(request)[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """A request that had its turn already: before all others of its line, since those who wait came later."""
        line = self._line(request)
        line[request.request_id] = request
        line.move_to_end(request.request_id, last=False)

    def head(self) -> Request | None:
        """Whose turn it is."""
        heads = (next(iter(line.values())) for line in self._lines.values())
        return min(heads, key=by_rank, default=None)

    def remove(self, request: Request) -> None:
        """Take a request out, if it waits."""
        line = self._line(request)
        line.pop(request.request_id, None)
        if not line:
            del self._lines[request.params.priority, request.client]

    def _line(self, request: Request) -> OrderedDict[str, Request]:
        return self._lines.setdefault((request.params.priority, request.client), OrderedDict())

    def _fair_seconds(self, request: Request) -> float:
        now_seconds = self._latest_seconds
        self._next_seconds = {
            client: seconds for client, seconds in self._next_seconds.items() if seconds > now_seconds
        }
        seconds = self._next_seconds.get(request.client, now_seconds)
        self._next_seconds[request.client] = seconds + request.num_prompt_tokens * SECONDS_PER_TOKEN
        return seconds
