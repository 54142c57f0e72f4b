"""Why a server does not serve a request that is in order; every protocol has a status for each."""

from __future__ import annotations

RETRY_AFTER_MS = 1000
"""When an overloaded server may be tried again."""


class UnavailableError(RuntimeError):
    """Nothing is served here now, or ever again: another server may do it."""


class OverloadedError(RuntimeError):
    """Too much is under way: the caller may come back after RETRY_AFTER_MS."""


class AbortedError(RuntimeError):
    """Somebody else has ended the request."""

    def __init__(self) -> None:
        super().__init__("the request was aborted")
