"""Grammars of answers that are calls, or have calls of tools that insist on their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.grammar_trial import SPACES
from jaxserve.json_schema import check_schema
from jaxserve.openai.tool_formats import Answer
from jaxserve.openai.tools import Tools
from jaxserve.structured_outputs import MAX_TEXT_BYTES
from jaxserve.tokenizer import Tokenizer

_TEXT = r"/(.|\n)*/"


def tool_grammar(tools: Tools, tokenizer: Tokenizer) -> str | None:
    """In Lark's syntax; None where the answer is free. Raises RequestError for schemas that no grammar has.

    Calls that must be made are the whole answer. Otherwise text may stand where the format lets it.
    """
    strict = [bool(schema["function"].get("strict")) for schema in tools.schemas]
    if not tools.required and not any(strict):
        return None
    rules: list[str] = []
    names: list[str] = []
    for index, schema in enumerate(tools.schemas):
        name = schema["function"]["name"]
        if tools.only not in (None, name):
            continue
        names.append(name)
        given = schema["function"].get("parameters") if strict[index] or tools.required else None
        where = f"tools[{index}].function.parameters"
        rules.append(f"arguments_{len(names) - 1}: %json {_arguments(where, given or {})}")
    answer = Answer(names, tools.required, tools.parallel and tools.only is None, tokenizer)
    grammar = "\n".join(["%llguidance {}", *tools.format.rules(answer), *rules, f"TEXT: {_TEXT}"])
    if len(grammar) > MAX_TEXT_BYTES:
        raise RequestError(f"tools must make a grammar of at most {MAX_TEXT_BYTES} bytes, got {len(grammar)}")
    return grammar


def _arguments(where: str, parameters: Mapping[str, Any]) -> str:
    """The schema of a tool's arguments, which are an object."""
    if parameters.get("type", "object") != "object":
        raise RequestError(f"{where}.type must be 'object', got {parameters['type']!r:.80}")
    schema = json.loads(check_schema(where, {"type": "object", **parameters}))
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACES}})
