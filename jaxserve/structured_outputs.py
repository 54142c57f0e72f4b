"""What an output must be: JSON of a schema, a match of an expression, one of some choices, a sentence of a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from jaxserve.errors import RequestError
from jaxserve.json_schema import check_schema, dumped

MAX_CHOICES = 1024
MAX_TEXT_BYTES = 64 * 1024
"""Of an expression, a grammar, tags, and all choices together."""
MAX_TAGS = 128


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of these; names are vLLM's.

    json: a JSON Schema, as an object or its text.   json_object: any JSON object.
    regex: matches the whole output; Rust's syntax, without assertions and references to groups.
    choice: the output is one of these strings.
    grammar: in Lark's syntax as llguidance has it, or in GBNF's (``root ::= ...``).
    structural_tag: ``{"structures": [{"begin": ..., "schema": ..., "end": ...}], "triggers": [...]}``: free text, but
    what follows a trigger is the rest of a ``begin`` that starts with it, JSON of that schema, and ``end``.
    Objects become their JSON text, lists tuples. Raises RequestError, naming the field, the value and the limit.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool | None):
            raise RequestError(f"structured_outputs.json_object must be True or False, got {self.json_object!r:.80}")
        given = self._given()
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise RequestError(f"structured_outputs must have exactly one of {names}, got {', '.join(given) or 'none'}")
        value = _CHECKS[self.name](f"structured_outputs.{self.name}", getattr(self, self.name))
        object.__setattr__(self, self.name, value)

    @property
    def name(self) -> str:
        """Which of the fields it has."""
        return self._given()[0]

    def _given(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]

    @classmethod
    def of(cls, value: object) -> Self | None:
        """From itself or a mapping with its fields; None stays None. Raises RequestError."""
        if isinstance(value, cls | None):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"structured_outputs must be an object, got {value!r:.80}")
        known = [f.name for f in fields(cls)]
        if unknown := sorted(str(name) for name in value if name not in known):
            raise RequestError(f"unknown field {unknown[0]!r:.80} of structured_outputs; known: {', '.join(known)}")
        return cls(**value)


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be a string, got {value!r:.80}")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{name} must be a string of valid Unicode, got {value!r:.80}") from None
    if num_bytes > MAX_TEXT_BYTES:
        raise RequestError(f"{name} must be at most {MAX_TEXT_BYTES} bytes, got {num_bytes}")
    return value


def _check_grammar(name: str, value: object) -> str:
    text = _check_text(name, value)
    # The library also takes its own inner form, and schemas of which it leaves out what it does not know.
    if text.lstrip().startswith("{") or "lenient" in text or "coerce_one_of" in text:
        raise RequestError(f"{name} must be a grammar, with no lenient or coerce_one_of, got {text!r:.80}")
    return text


def _check_choice(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_CHOICES:
        size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
        raise RequestError(f"{name} must be a list of 1 to {MAX_CHOICES} strings, got {type(value).__name__}{size}")
    for index, entry in enumerate(value):
        if not _check_text(f"{name}[{index}]", entry):
            raise RequestError(f"{name}[{index}] must be a string of at least one character, got ''")
    _check_text(name, "".join(value))
    return tuple(value)


def _check_tags(name: str, value: object) -> str:
    text = _check_text(name, value if isinstance(value, str) else dumped(name, value))
    try:
        tags = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be JSON, got {text!r:.80}: {error}") from None
    structures = tags.get("structures") if isinstance(tags, Mapping) else None
    triggers = tags.get("triggers") if isinstance(tags, Mapping) else None
    if not isinstance(structures, list) or not 1 <= len(structures) <= MAX_TAGS or not isinstance(triggers, list):
        raise RequestError(
            f"{name} must have a list of 1 to {MAX_TAGS} structures and one of triggers, got {text!r:.80}"
        )
    for index, entry in enumerate(structures):
        _check_tag(f"{name}.structures[{index}]", entry, triggers)
    return text


def _check_tag(name: str, entry: Any, triggers: list[Any]) -> None:
    if not isinstance(entry, Mapping) or entry.keys() != {"begin", "schema", "end"}:
        raise RequestError(f"{name} must be {{'begin': ..., 'schema': ..., 'end': ...}}, got {entry!r:.80}")
    begin = _check_text(f"{name}.begin", entry["begin"])
    _check_text(f"{name}.end", entry["end"])
    check_schema(f"{name}.schema", entry["schema"])
    if not any(isinstance(trigger, str) and trigger and begin.startswith(trigger) for trigger in triggers):
        raise RequestError(f"{name}.begin must start with one of triggers {triggers!r:.80}, got {begin!r:.80}")


_CHECKS: Mapping[str, Any] = {
    "json": check_schema,
    "regex": _check_text,
    "choice": _check_choice,
    "grammar": _check_grammar,
    "json_object": lambda _, value: value,
    "structural_tag": _check_tags,
}
