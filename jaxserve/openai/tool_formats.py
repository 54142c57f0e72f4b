"""How models write calls of tools in their text: to read them, and as grammars that they must follow."""

from __future__ import annotations

import json
import random
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.tokenizer import Tokenizer

ARGUMENTS = "[ARGS]"
"""What Mistral's models have between a name and arguments since 2025."""
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class Answer:
    """What a grammar of an answer goes by."""

    names: Sequence[str]
    """Of what may be called. The rules of their arguments are ``arguments_0`` and so on."""
    required: bool
    """Whether calls are all of the answer; otherwise text may stand where the format lets it (``TEXT``)."""
    several: bool
    tokenizer: Tokenizer


class ToolFormat(ABC):
    """How the models of some families write calls."""

    name: str
    """vLLM's name of it."""
    begin: str
    """What a block of calls begins with."""
    end: str | None = None
    """What it ends with; without, it goes on to the end of the text."""
    only_at_start: bool = False
    """Whether no text goes before it."""

    @abstractmethod
    def is_of(self, template: str) -> bool:
        """Whether a chat template tells its model to write calls in this way."""

    @abstractmethod
    def parse(self, block: str) -> list[tuple[object, object]]:
        """Names and arguments of the calls in a block, with what it begins and ends with. Raises ValueError and its
        like for one that holds something else."""

    @abstractmethod
    def rules(self, answer: Answer) -> list[str]:
        """Lark's rules, ``start`` among them, of an answer in which calls follow those of their arguments."""

    def new_id(self) -> str:
        return f"chatcmpl-tool-{uuid.uuid4().hex}"


class Hermes(ToolFormat):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, of Hermes, Qwen 2.5 and 3, and SmolLM2, which
    writes a list of them."""

    name = "hermes"
    begin, end = "<tool_call>", "</tool_call>"

    def is_of(self, template: str) -> bool:
        # Others have the same tag around XML.
        return self.begin in template and '"arguments' in template and "<function=" not in template

    def parse(self, block: str) -> list[tuple[object, object]]:
        value = json.loads(block.removeprefix(self.begin).removesuffix(self.end))
        return [_call(entry) for entry in (value if isinstance(value, list) else [value])]

    def rules(self, answer: Answer) -> list[str]:
        call = f"call: {_any(_objects(answer, 'arguments'))}"
        return [*_blocks(self, r'"\n" call "\n"', answer, answer.several), call]


class Llama3(ToolFormat):
    """Nothing but ``{"name": ..., "parameters": {...}}``, or several with semicolons between them."""

    name = "llama3_json"
    begin = "{"
    only_at_start = True

    def is_of(self, template: str) -> bool:
        return "<|start_header_id|>" in template and '"parameters": ' in template

    def parse(self, block: str) -> list[tuple[object, object]]:
        calls = []
        while block:
            value, end = _JSON.raw_decode(block)
            calls.append(_call(value))
            block = block[end:].lstrip("; \n")
        return calls

    def rules(self, answer: Answer) -> list[str]:
        calls = [f"calls: call{_more('; ', answer)}", f"call: {_any(_objects(answer, 'parameters'))}"]
        if answer.required:
            return ["start: calls", *calls]
        return ["start: calls | OTHER", r"OTHER: /([ \n\t]*[^{ \n\t](.|\n)*)?/", *calls]


class Mistral(ToolFormat):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``; since 2025 ``[TOOL_CALLS]NAME[ARGS]{...}`` a call."""

    name = "mistral"
    begin = "[TOOL_CALLS]"

    def is_of(self, template: str) -> bool:
        return self.begin in template

    def parse(self, block: str) -> list[tuple[object, object]]:
        calls = []
        for part in filter(str.strip, block.split(self.begin)):
            if part.lstrip().startswith("["):
                calls += [_call(entry) for entry in json.loads(part)]
            else:
                at = part.index("{")
                called = part[:at].replace(ARGUMENTS, "").partition("[CALL_ID]")[0].strip()
                calls.append((called, json.loads(part[at:])))
        return calls

    def rules(self, answer: Answer) -> list[str]:
        if answer.tokenizer.token_id(ARGUMENTS) is not None:
            mark = _mark(ARGUMENTS, answer.tokenizer)
            calls = [f'"{name}" {mark} arguments_{index}' for index, name in enumerate(answer.names)]
            return _blocks(self, f"({_any(calls)})", answer, answer.several)
        listed = f'"[" call{_more(", ", answer)} "]"'
        return [*_blocks(self, listed, answer, False), f"call: {_any(_objects(answer, 'arguments'))}"]

    def new_id(self) -> str:
        # Its chat templates insist on nine of these.
        return "".join(random.choices(string.ascii_letters + string.digits, k=9))


FORMATS: tuple[ToolFormat, ...] = (Mistral(), Llama3(), Hermes())


def _call(entry: Mapping[str, Any]) -> tuple[object, object]:
    return entry["name"], entry["arguments"] if "arguments" in entry else entry["parameters"]


def _blocks(format: ToolFormat, body: str, answer: Answer, several: bool) -> list[str]:
    """Blocks of calls, in text where they need not come."""
    closed = f"{body} {_mark(format.end, answer.tokenizer)}" if format.end is not None else body
    block, times = f"block: {closed}", "*" if several else "?"
    mark = _mark(format.begin, answer.tokenizer)
    if answer.required:
        between = r'"\n"?' if format.end is not None else ""
        return [f"start: {mark} block" + (f" ({between} {mark} block)*" if several else ""), block]
    if mark.startswith("<"):
        return [f"start: (TEXT {mark} block){times} TEXT", block]
    return [f"start: (lead block){times} TEXT", f"lead[lazy]: TEXT {mark}", block]


def _objects(answer: Answer, arguments: str) -> list[str]:
    return [
        f'{json.dumps(f"""{{"name": "{name}", "{arguments}": """)} arguments_{index} "}}"'
        for index, name in enumerate(answer.names)
    ]


def _any(rules: Sequence[str]) -> str:
    return " | ".join(rules)


def _more(separator: str, answer: Answer) -> str:
    return f" ({json.dumps(separator)} call)*" if answer.several else ""


def _mark(mark: str, tokenizer: Tokenizer) -> str:
    """A token where it is a special one, else a text."""
    token_id = tokenizer.token_id(mark)
    return f"<[{token_id}]>" if token_id in tokenizer.special_token_ids else json.dumps(mark)
