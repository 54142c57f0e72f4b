"""Values of a JSON object or of a GGUF file's metadata, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from jaxserve.errors import ModelError

LARGEST_INT: Final = 2**31 - 1
LARGEST_SIZE: Final = 2**24
"""Of a tensor's dimension."""
LARGEST_COUNT: Final = 2**12
"""Of layers, experts and what else is built one by one."""
LARGEST_NUMBER: Final = 1e30
"""Fits into float32."""


class Fields:
    """``values``, by key. ``where`` names their file in messages, ``prefix`` the object that they are part of.

    A key that is missing or null has the ``default``, and has to be there without one. Every complaint is a ModelError
    that names file, key, what was found and what is supported.
    """

    def __init__(self, values: Mapping[str, Any], where: object, prefix: str = "") -> None:
        self.values = dict(values)
        self.where = str(where)
        self.prefix = prefix

    def error(self, key: str, wanted: str) -> ModelError:
        """That ``key`` must be ``wanted``."""
        found = f"found {self.values[key]!r:.80}" if key in self.values else "but it is missing"
        return ModelError(f"{self.where}: {self.prefix}{key} must be {wanted}, {found}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = LARGEST_INT) -> int:
        """An integer in [low, high]."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"an integer in [{low}, {high}]")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int = LARGEST_INT) -> int | None:
        """An integer in [low, high], or None where the key is missing or null."""
        return self.integer(key, low=low, high=high) if self.has(key) else None

    def number(
        self, key: str, default: float | None = None, *, high: float = LARGEST_NUMBER, zero: bool = False
    ) -> float:
        """A number in (0, high], 0 included where ``zero``."""
        value: Any = self.values.get(key)
        value = default if value is None else value
        if not _is_number(value) or not 0 <= value <= high or (value == 0 and not zero):
            raise self.error(key, f"a number in {'[' if zero else '('}0, {high:g}]")
        return value

    def optional_number(self, key: str, *, high: float = LARGEST_NUMBER) -> float | None:
        """A number in (0, high], or None where the key is missing or null."""
        return self.number(key, high=high) if self.has(key) else None

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of ``count`` positive numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(_is_number(v) and 0 < v <= LARGEST_NUMBER for v in value):
            raise self.error(key, f"a list of {count} numbers in (0, {LARGEST_NUMBER:g}]")
        if len(value) != count:
            raise ModelError(f"{self.where}: {self.prefix}{key} must hold {count} numbers, found {len(value)}")
        return value

    def integers(self, key: str) -> list[int] | None:
        """A list of integers from 0 on, or None where the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise self.error(key, "a list of integers")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string, or None where there is none and no default."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def choice(self, key: str, supported: Sequence[str], default: str | None = None) -> str:
        """A string that is one of ``supported``, whatever its case."""
        found = self.text(key, default)
        if found is None or found.lower() not in supported:
            raise self.error(key, f"one of {', '.join(supported)}")
        return found.lower()

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            raise self.error(key, "a list of strings")
        return value

    def fields(self, key: str) -> Fields:
        """The object at ``key``, without any values where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value or {}, self.where, f"{self.prefix}{key}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)
