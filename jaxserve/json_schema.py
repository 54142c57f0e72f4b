"""Which JSON Schemas outputs can be made to follow: all that is asked for is enforced, or the schema is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.errors import RequestError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
"""Lists and objects in one another."""
REFUSED = frozenset({
    "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "contains", "contentEncoding",
    "contentMediaType", "contentSchema", "dependencies", "dependentRequired", "dependentSchemas", "disallow",
    "divisibleBy", "else", "extends", "if", "maxContains", "minContains", "not", "nullable", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "x-guidance",
})  # fmt: skip
"""Keywords of any draft and of OpenAPI with a meaning that no grammar has, and the one that changes the grammar's
library. Names that no draft knows are annotations, as the standard says."""
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
_MAPS = ("$defs", "definitions", "patternProperties", "properties")
"""Keywords that hold schemas by name; ``_LISTS`` and ``_SCHEMAS``: in a list, and one (or, in old drafts, a list)."""
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = ("additionalItems", "additionalProperties", "items")


def check_schema(name: str, value: object) -> str:
    """A schema's JSON text, of an object or the text of one. Raises RequestError; errors call the schema ``name``.

    What is wrong in the standard's own terms, such as a property that is no schema, is found when it is compiled.
    """
    text = value if isinstance(value, str) else dumped(name, value)
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(f"{name} must be at most {MAX_SCHEMA_BYTES} bytes of JSON, got {len(text)}")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be a JSON Schema, got {text!r:.80}: {error}") from None
    if not isinstance(schema, Mapping):
        raise RequestError(f"{name} must be a JSON Schema, an object, got {text!r:.80}")
    if (depth := _depth(schema)) > MAX_SCHEMA_DEPTH:
        raise RequestError(f"{name} must nest at most {MAX_SCHEMA_DEPTH} lists and objects, got {depth}")
    for path, part in _parts("#", schema):
        _check_part(f"{name} at {path}", part)
    return json.dumps(schema)


def dumped(name: str, value: object) -> str:
    """JSON text of what a caller gives in Python. Raises RequestError."""
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be JSON, got {type(value).__name__}: {error}") from None


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [entry for entry in level if isinstance(entry, dict | list)]:
        depth += 1
        level = [below for entry in level for below in (entry.values() if isinstance(entry, dict) else entry)]
    return depth


def _parts(path: str, schema: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schema and those in it, with where they are."""
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for name in _MAPS:
        if isinstance(found := schema.get(name), Mapping):
            for key, part in found.items():
                yield from _parts(f"{path}/{name}/{key}", part)
    for name in (*_LISTS, *_SCHEMAS):
        found = schema.get(name)
        if isinstance(found, list):
            for index, part in enumerate(found):
                yield from _parts(f"{path}/{name}/{index}", part)
        else:
            yield from _parts(f"{path}/{name}", found)


def _check_part(where: str, schema: Mapping[str, Any]) -> None:
    if refused := sorted(REFUSED & schema.keys()):
        raise RequestError(f"{where} has {refused[0]!r}, a keyword that cannot be served and must be left out")
    types, found = schema.get("type", "string"), schema.get("format")
    if found is not None and "string" in types and found not in FORMATS:
        raise RequestError(f"{where} has format {found!r:.80}, which cannot be served; known: {', '.join(FORMATS)}")
    # A grammar counts members, and cannot tell that two have one name.
    required, least = schema.get("required", ()), schema.get("minProperties", 0)
    if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
        raise RequestError(
            f"{where} has minProperties {least}, which must be at most {len(required) + 1}, one more than are required"
        )
