"""The errors of users: each names the field, the value and the limit."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot work: names the field, the value and the limit."""


class ModelError(ValueError):
    """A model that cannot be served: names what was found and what is supported."""


class RequestError(ValueError):
    """A request that cannot be served as asked: names the field, the value and the limit."""
