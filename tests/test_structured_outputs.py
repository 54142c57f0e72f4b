"""What outputs may be asked to be, and the words for what they may not."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve import RequestError, SamplingParams, StructuredOutputsParams
from jaxserve.json_schema import REFUSED


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_what_is_given_becomes_text_that_does_not_change() -> None:
    schema = {"type": "integer"}
    params = StructuredOutputsParams(json=schema)
    schema["type"] = "null"
    assert (params.name, params.json) == ("json", '{"type": "integer"}')
    assert params == StructuredOutputsParams(json='{"type":"integer"}')
    assert hash(params) == hash(StructuredOutputsParams(json={"type": "integer"}))
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")


def test_of_sampling_parameters() -> None:
    asked = StructuredOutputsParams(regex="a")
    assert SamplingParams().structured_outputs is None
    assert SamplingParams(structured_outputs={"regex": "a"}) == SamplingParams(structured_outputs=asked)
    with pytest.raises(RequestError, match="ignore_eos must be False with structured_outputs, got True"):
        SamplingParams(structured_outputs=asked, ignore_eos=True)


@pytest.mark.parametrize("keyword", sorted(REFUSED))
@pytest.mark.parametrize(
    ("path", "within"),
    [
        ("#", lambda part: part),
        ("#/properties/a", lambda part: {"properties": {"a": part}}),
        ("#/anyOf/1/items", lambda part: {"anyOf": [True, {"items": part}]}),
        ("#/$defs/x/prefixItems/0/additionalProperties",
         lambda part: {"$defs": {"x": {"prefixItems": [{"additionalProperties": part}]}}}),
    ],
)  # fmt: skip
def test_keywords_are_refused_by_name(keyword: str, path: str, within: Any) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(json=within({keyword: True}))
    assert str(caught.value).startswith(f"structured_outputs.json at {path} has {keyword!r}, a keyword that cannot be")


def test_names_of_properties_and_values_are_no_keywords() -> None:
    StructuredOutputsParams(
        json={"properties": {"not": {"const": {"if": 1}}, "x": {"x-order": 1, "enum": [{"not": 1}]}}}
    )


TAG = {"begin": "<a>", "schema": {}, "end": ""}
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "structured_outputs must have exactly one of json, regex, choice, grammar, json_object, structural_tag, got "),
    ({"regex": "a", "grammar": "b"}, "structured_outputs must have exactly one of json, regex, choice, grammar, json_"),
    ({"json_object": 1}, "structured_outputs.json_object must be True or False, got 1"),
    ({"json": "{"}, "structured_outputs.json must be a JSON Schema, got '{': "),
    ({"json": "true"}, "structured_outputs.json must be a JSON Schema, an object, got 'true'"),
    ({"json": {"enum": [b""]}}, "structured_outputs.json must be JSON, got dict: "),
    ({"json": {"title": "a" * 65536}}, "structured_outputs.json must be at most 65536 bytes of JSON, got 65549"),
    ({"json": nested(64)}, "structured_outputs.json must nest at most 64 lists and objects, got 65"),
    ({"json": "[" * 60000}, "structured_outputs.json must be a JSON Schema, got "),
    ({"json": {"format": "regex"}}, "structured_outputs.json at # has format 'regex', which cannot be served; known: "),
    ({"json": {"required": ["a"], "minProperties": 3}}, "structured_outputs.json at # has minProperties 3, which must"),
    ({"regex": 1}, "structured_outputs.regex must be a string, got 1"),
    ({"regex": "\ud800"}, "structured_outputs.regex must be a string of valid Unicode, got "),
    ({"regex": "é" * 40000}, "structured_outputs.regex must be at most 65536 bytes, got 80000"),
    ({"choice": []}, "structured_outputs.choice must be a list of 1 to 1024 strings, got list of 0"),
    ({"choice": ["a"] * 1025}, "structured_outputs.choice must be a list of 1 to 1024 strings, got list of 1025"),
    ({"choice": "ab"}, "structured_outputs.choice must be a list of 1 to 1024 strings, got str"),
    ({"choice": ["a", 1]}, "structured_outputs.choice[1] must be a string, got 1"),
    ({"choice": [""]}, "structured_outputs.choice[0] must be a string of at least one character, got ''"),
    ({"choice": ["a" * 40000] * 2}, "structured_outputs.choice must be at most 65536 bytes, got 80000"),
    ({"grammar": ' {"grammars": []}'}, "structured_outputs.grammar must be a grammar, with no lenient or coerce_one_o"),
    ({"grammar": 'start: %json {"x-guidance": {"lenient": true}}'}, "structured_outputs.grammar must be a grammar, wi"),
    ({"structural_tag": "["}, "structured_outputs.structural_tag must be JSON, got '[': "),
    ({"structural_tag": {"format": {}}}, "structured_outputs.structural_tag must have a list of 1 to 128 structures a"),
    ({"structural_tag": {"structures": [{}], "triggers": []}}, "structured_outputs.structural_tag.structures[0] must "),
    ({"structural_tag": {"structures": [TAG], "triggers": ["b"]}},
     "structured_outputs.structural_tag.structures[0].begin must start with one of triggers ['b'], got '<a>'"),
    ({"structural_tag": {"structures": [{**TAG, "schema": {"not": {}}}], "triggers": ["<"]}},
     "structured_outputs.structural_tag.structures[0].schema at # has 'not', a keyword"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_errors_name_the_field_the_value_and_the_limit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(structured_outputs=fields)
    assert str(caught.value).startswith(message)
