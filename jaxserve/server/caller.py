"""Who calls: what a door has found out by the key, and admission and the log go by, whatever the protocol."""

from __future__ import annotations

from contextvars import ContextVar
from hashlib import sha256
from typing import NamedTuple

NAME_CHARACTERS = 8


class Caller(NamedTuple):
    """The holder of a key. ``name`` tells callers apart, in the log too, and nothing of their keys."""

    name: str

    @classmethod
    def of(cls, key: bytes) -> Caller:
        return cls(sha256(key).hexdigest()[:NAME_CHARACTERS])

    @property
    def client(self) -> str:
        """What schedulers, which are fair among clients, call it; nothing where no key tells one from another."""
        return "" if self is ANYBODY else self.name


ANYBODY = Caller("-")
"""Whoever calls where no key is asked for."""
current_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
"""Of the request that a task serves; its door sets it."""
