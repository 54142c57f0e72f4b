"""Tools: what a chat may call, and the calls in an answer's text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxserve.errors import RequestError
from jaxserve.openai.fields import take_switch
from jaxserve.openai.tool_formats import FORMATS, ToolFormat
from jaxserve.text import overlap
from jaxserve.tokenizer import Tokenizer

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class ToolCall(NamedTuple):
    """A call as a response has it."""

    id: str
    name: str
    arguments: str
    """A JSON object's text."""

    def body(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Tools:
    """What one chat may call, and how its model writes that."""

    schemas: Sequence[Mapping[str, Any]]
    """As the chat gives them, for the template."""
    format: ToolFormat
    parallel: bool = True
    """Whether an answer may hold several calls; of more than one the others are left out."""
    required: bool = False
    """Whether the answer is calls and nothing else."""
    only: str | None = None
    """The one to call."""

    @property
    def names(self) -> list[str]:
        return [schema["function"]["name"] for schema in self.schemas]

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether the text must keep special tokens, because they tell where calls are."""
        return any(
            mark is not None and tokenizer.token_id(mark) in tokenizer.special_token_ids
            for mark in (self.format.begin, self.format.end)
        )


def take_tools(given: dict[str, Any], tokenizer: Tokenizer) -> Tools | None:
    """Take tools and what belongs to them out of a body. Raises RequestError."""
    schemas, choice = given.pop("tools", []), given.pop("tool_choice", "auto")
    parallel = take_switch(given, "parallel_tool_calls", True)
    schemas = check_tools(schemas)
    only = _name_of_choice(choice, [schema["function"]["name"] for schema in schemas])
    if not schemas or choice == "none":
        return None
    template = tokenizer.chat_template
    found = next((entry for entry in FORMATS if template is not None and entry.is_of(template.tool_source)), None)
    if found is None:
        known = ", ".join(entry.name for entry in FORMATS)
        raise RequestError(f"tools cannot be served: the model's chat template has calls in no known format: {known}")
    return Tools(schemas, found, parallel, required=only is not None or choice == "required", only=only)


def check_tools(schemas: Any) -> list[Mapping[str, Any]]:
    """What a chat gives as tools. Raises RequestError."""
    if not isinstance(schemas, list) or len(schemas) > MAX_TOOLS:
        raise RequestError(f"tools must be a list of at most {MAX_TOOLS} tools, got {schemas!r:.80}")
    for index, schema in enumerate(schemas):
        _check_tool(f"tools[{index}]", schema)
    return schemas


def _name_of_choice(choice: object, names: Sequence[str]) -> str | None:
    """The tool that must be called, if it is one. Raises RequestError."""
    if choice in ("none", "auto"):
        return None
    if choice == "required":
        if not names:
            raise RequestError("tool_choice 'required' needs tools, got none")
        return None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        one = "{'type': 'function', 'function': {'name': ...}}"
        raise RequestError(f"tool_choice must be 'none', 'auto', 'required' or {one}, got {choice!r:.80}")
    if name not in names:
        raise RequestError(f"tool_choice.function.name must be the name of one of tools, got {name!r:.80}")
    return str(name)


def _check_tool(name: str, schema: object) -> None:
    function = schema.get("function") if isinstance(schema, Mapping) and schema.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{name} must be {{'type': 'function', 'function': ...}}, got {schema!r:.80}")
    called, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(called, str) or NAME.fullmatch(called) is None:
        raise RequestError(f"{name}.function.name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, got {called!r:.80}")
    if not isinstance(function.get("description", ""), str | None):
        raise RequestError(f"{name}.function.description must be a string, got {function['description']!r:.80}")
    if not isinstance(parameters, Mapping | None):
        raise RequestError(f"{name}.function.parameters must be a JSON Schema, got {parameters!r:.80}")
    if not isinstance(function.get("strict"), bool | None):
        raise RequestError(f"{name}.function.strict must be true or false, got {function['strict']!r:.80}")


class ToolParser:
    """Tells calls from other text, which arrives in parts; however it is divided, the outcome is the same.

    A call is given out once its block is whole. A block that holds no calls is text as it stands; so is one that calls
    something else than the tools. Blanks beside calls are left out.
    """

    def __init__(self, tools: Tools) -> None:
        self._format, self._names, self._parallel = tools.format, tools.names, tools.parallel
        self._held = ""
        """What may yet be a block of calls, and blanks before it."""
        self._may_begin, self._after_block = True, False
        """Whether a block could follow the text given out so far, and whether that ended with one."""
        self.num_calls = 0

    def feed(self, text: str, is_last: bool) -> tuple[str, list[ToolCall]]:
        """What ``text`` adds to the text that is certain to be none of calls, and to the calls."""
        self._held += text
        content, calls = "", []
        while (block := self._find_block(is_last)) is not None:
            start, end = block
            found = self._parse(self._held[start:end])
            content += self._give(self._held[: end if found is None else start], keep_blanks=found is None)
            self._held = self._held[end:]
            self._after_block = found is not None
            calls += found or []
        certain = self._held if is_last else self._held[: self._num_certain()].rstrip()
        self._held = self._held[len(certain) :]
        return content + self._give(certain, keep_blanks=not self.num_calls), calls

    def _find_block(self, is_last: bool) -> tuple[int, int] | None:
        """Where the next whole block begins and ends."""
        begin = self._find_begin()
        if begin < 0:
            return None
        end = self._held.find(self._format.end, begin) if self._format.end is not None else -1
        if end < 0:
            return (begin, len(self._held)) if is_last else None
        return begin, end + len(self._format.end or "")

    def _find_begin(self) -> int:
        if not self._may_begin:
            return -1
        begin = self._held.find(self._format.begin)
        return -1 if self._format.only_at_start and self._held[: max(begin, 0)].strip() else begin

    def _num_certain(self) -> int:
        """Characters of what is held that no block begins with."""
        begin = self._find_begin()
        if begin >= 0:
            return begin
        return len(self._held) - (overlap(self._held, self._format.begin) if self._may_begin else 0)

    def _give(self, text: str, keep_blanks: bool) -> str:
        if self._after_block:
            text = text.lstrip()
        if not keep_blanks:
            text = text.rstrip()
        if text.strip():
            self._after_block = False
            self._may_begin = not self._format.only_at_start
        return text

    def _parse(self, block: str) -> list[ToolCall] | None:
        """Its calls; None where it holds anything else."""
        try:
            found = self._format.parse(block)
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        if not found or not all(name in self._names and isinstance(value, dict) for name, value in found):
            return None
        calls = [
            ToolCall(self._format.new_id(), str(name), json.dumps(value, ensure_ascii=False)) for name, value in found
        ]
        room = len(calls) if self._parallel else max(0, 1 - self.num_calls)
        self.num_calls += len(calls[:room])
        return calls[:room]
