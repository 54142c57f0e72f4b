"""Fields of a request's body: taking one out checks it, so that what is left in the end is unknown."""

from __future__ import annotations

from typing import Any

from jaxserve.errors import RequestError
from jaxserve.sampling_params import MAX_INT32, checked_integer


def take_switch(given: dict[str, Any], name: str, default: bool = False) -> bool:
    """What is true or false."""
    value = given.pop(name, None)
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} must be true or false, got {value!r:.80}")
    return default if value is None else value


def rename_max_tokens(given: dict[str, Any], name: str) -> None:
    """Where a body calls max_tokens ``name``."""
    if name in given:
        given["max_tokens"] = checked_integer(name, given.pop(name), 1, MAX_INT32)


def take_object(given: dict[str, Any], name: str) -> dict[str, Any]:
    """An object, a copy of it; empty by default."""
    value = given.pop(name, None)
    if not isinstance(value, dict | None):
        raise RequestError(f"{name} must be an object, got {value!r:.80}")
    return dict(value or {})
