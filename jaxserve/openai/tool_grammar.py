"""Grammars of answers that are calls, or have calls of tools that insist on their schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.grammar_trial import SPACES
from jaxserve.json_schema import check_schema
from jaxserve.openai.tools import Hermes, Mistral, Tools
from jaxserve.structured_outputs import MAX_TEXT_BYTES
from jaxserve.tokenizer import Tokenizer

ARGUMENTS = "[ARGS]"
"""What Mistral's models have between a name and arguments since 2025."""
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
    grammar = "\n".join(["%llguidance {}", *_answer(tools, tokenizer, names), *rules, f"TEXT: {_TEXT}"])
    if len(grammar) > MAX_TEXT_BYTES:
        raise RequestError(f"tools must make a grammar of at most {MAX_TEXT_BYTES} bytes, got {len(grammar)}")
    return grammar


def _arguments(where: str, parameters: Mapping[str, Any]) -> str:
    """The schema of a tool's arguments, which are an object."""
    if parameters.get("type", "object") != "object":
        raise RequestError(f"{where}.type must be 'object', got {parameters['type']!r:.80}")
    schema = json.loads(check_schema(where, {"type": "object", **parameters}))
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACES}})


def _answer(tools: Tools, tokenizer: Tokenizer, names: Sequence[str]) -> list[str]:
    """The rules of the whole answer, over those of the arguments."""
    begin, several = tools.format.begin, tools.parallel and tools.only is None
    if isinstance(tools.format, Mistral):
        if tokenizer.token_id(ARGUMENTS) is not None:
            mark = _mark(ARGUMENTS, tokenizer)
            calls = [f'"{name}" {mark} arguments_{index}' for index, name in enumerate(names)]
            return _blocks(begin, f"({_any(calls)})", None, tools, tokenizer, several)
        calls = _objects(names, "arguments")
        listed = f'"[" call{_more(", ", several)} "]"'
        return [*_blocks(begin, listed, None, tools, tokenizer, False), f"call: {_any(calls)}"]
    if isinstance(tools.format, Hermes):
        calls = _objects(names, "arguments")
        return [*_blocks(begin, r'"\n" call "\n"', tools.format.end, tools, tokenizer, several), f"call: {_any(calls)}"]
    calls = [f"calls: call{_more('; ', several)}", f"call: {_any(_objects(names, 'parameters'))}"]
    if tools.required:
        return ["start: calls", *calls]
    return ["start: calls | OTHER", r"OTHER: /([ \n\t]*[^{ \n\t](.|\n)*)?/", *calls]


def _blocks(begin: str, body: str, end: str | None, tools: Tools, tokenizer: Tokenizer, several: bool) -> list[str]:
    """Blocks of calls, in text where they need not come."""
    closed = f"{body} {_mark(end, tokenizer)}" if end is not None else body
    block, times = f"block: {closed}", "*" if several else "?"
    mark = _mark(begin, tokenizer)
    if tools.required:
        between = r'"\n"?' if end is not None else ""
        return [f"start: {mark} block" + (f" ({between} {mark} block)*" if several else ""), block]
    if mark.startswith("<"):
        return [f"start: (TEXT {mark} block){times} TEXT", block]
    return [f"start: (lead block){times} TEXT", f"lead[lazy]: TEXT {mark}", block]


def _objects(names: Sequence[str], arguments: str) -> list[str]:
    return [
        f'{json.dumps(f"""{{"name": "{name}", "{arguments}": """)} arguments_{index} "}}"'
        for index, name in enumerate(names)
    ]


def _any(rules: Sequence[str]) -> str:
    return " | ".join(rules)


def _more(separator: str, several: bool) -> str:
    return f" ({json.dumps(separator)} call)*" if several else ""


def _mark(mark: str, tokenizer: Tokenizer) -> str:
    """A token where it is a special one, else a text."""
    token_id = tokenizer.token_id(mark)
    return f"<[{token_id}]>" if token_id in tokenizer.special_token_ids else json.dumps(mark)
