"""Fields of a request's body: taking one out checks it, so that what is left in the end is unknown."""

from __future__ import annotations

from typing import Any

from jaxserve.errors import RequestError
from jaxserve.sampling_params import as_integer

MAX_INT32 = 2**31 - 1


def take_switch(given: dict[str, Any], name: str, default: bool = False) -> bool:
    """What is true or false."""
    value = given.pop(name, None)
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} must be true or false, got {value!r:.80}")
    return default if value is None else value


def rename_max_tokens(given: dict[str, Any], name: str) -> None:
    """Where a body calls max_tokens ``name``."""
    if name not in given:
        return
    value = given.pop(name)
    try:
        number = as_integer(value)
    except TypeError:
        number = 0
    if not 1 <= number <= MAX_INT32:
        raise RequestError(f"{name} must be an integer in [1, {MAX_INT32}], got {value!r}")
    given["max_tokens"] = number


def take_object(given: dict[str, Any], name: str) -> dict[str, Any]:
    """An object, a copy of it; empty by default."""
    value = given.pop(name, None)
    if not isinstance(value, dict | None):
        raise RequestError(f"{name} must be an object, got {value!r:.80}")
    return dict(value or {})
