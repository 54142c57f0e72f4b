"""JSON Schemas that between them have every keyword that outputs can follow."""

from __future__ import annotations

from typing import Any

from jaxserve.json_schema import FORMATS


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "additionalProperties": False,
        "required": list(properties) if required is None else required,
    }  # fmt: skip


STRING: dict[str, Any] = {"type": "string", "maxLength": 6}
INTEGER: dict[str, Any] = {"type": "integer"}
BASE: list[dict[str, Any]] = [
    {"type": "null"},
    {"type": "boolean"},
    INTEGER,
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 130},
    {"type": "integer", "multipleOf": 7},
    {"type": "integer", "multipleOf": 3, "minimum": 10, "maximum": 40},
    {"type": "number", "minimum": 1.5, "exclusiveMaximum": 2},
    {"type": "number", "multipleOf": 0.25},
    {"type": "number", "maximum": -0.5},
    STRING,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "b[0-9]"},
    {"type": "string", "pattern": "^(ab|c){2}$"},
    {"type": "string", "pattern": "^[a-c]+$", "minLength": 2, "maxLength": 4},
    *({"type": "string", "format": name} for name in FORMATS),
    {"const": {"a": [1, None, "\u00e9\""]}},
    {"enum": [1, "a", None, {"a": [1]}, 1.5, True]},
    {"type": "string", "enum": ["abc", "b", 3]},
    {"enum": ["abc", "a"], "minLength": 2},
    {"type": ["string", "null"], "maxLength": 2},
    {"type": "array", "items": INTEGER, "maxItems": 3},
    {"type": "array", "items": STRING, "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [INTEGER], "items": {"type": "boolean"}, "maxItems": 4},
    _object(a=INTEGER),
    _object([], a=INTEGER, b=STRING),
    _object(["b"], a=INTEGER, b={"type": "array", "items": {"type": "boolean"}, "maxItems": 2}),
    _object(a=_object(b=_object(c={"type": "null"}))),
    {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3},
    {"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "minProperties": 2},
    {"type": "object", "patternProperties": {"^x_": INTEGER}, "additionalProperties": False},
    {"patternProperties": {"^a": STRING}, "properties": {"b": INTEGER}, "additionalProperties": False,
     "type": "object"},
    {"type": "object", "properties": {"a": False, "b": True}, "required": ["b"], "additionalProperties": False},
    {"anyOf": [INTEGER, STRING]},
    {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], **_object([], a=INTEGER, b=INTEGER)},
    {"oneOf": [STRING, {"type": "null"}]},
    {"oneOf": [_object(k={"const": "a"}, v=INTEGER), _object(k={"const": "b"}, v=STRING)]},
    {"allOf": [{"minimum": 1}, {"maximum": 5}], "type": "integer"},
    {"allOf": [{"pattern": "^a"}, {"pattern": "b$"}], "type": "string", "maxLength": 5},
    {"$defs": {"n": _object([], c={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"},
    {"definitions": {"s": {"type": "string"}}, "$ref": "#/definitions/s", "maxLength": 3},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "http://a.b/c", "title": "t", "default": 1,
     "description": "d", "examples": [1], "$comment": "c", "deprecated": True, "readOnly": True, **INTEGER},
]  # fmt: skip
WITHIN = (
    lambda schema: _object(["x"], x=schema, y=INTEGER),
    lambda schema: {"type": "array", "items": schema, "minItems": 1, "maxItems": 2},
)
SCHEMAS = BASE + [
    within(schema) for schema in BASE if "$ref" not in schema and "$id" not in schema for within in WITHIN
]
