"""The errors of users: each names the field, the value and the limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot work: names the field, the value and the limit."""


class ModelError(ValueError):
    """A model that cannot be served: names what was found and what is supported."""


class RequestError(ValueError):
    """A request that cannot be served as asked: names the field, the value and the limit."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put the name of one of many, such as ``prompts[3]``, before the RequestError that the block raises."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from error
