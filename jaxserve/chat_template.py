"""Chat templates: a conversation as the text that a model was trained to continue."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxserve.errors import RequestError

TEMPLATE_FOLDER = "additional_chat_templates"
"""Where a tokenizer's folder has all but the default one."""


class ChatTemplate:
    """A model's template, and another one for conversations with tools where it has two. Safe to use from several
    threads.

    ``special_tokens``: see Tokenizer.
    """

    def __init__(self, source: str, tool_source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.tool_source = source if tool_source is None else tool_source
        self._special_tokens = special_tokens

    def save(self, folder: Path) -> None:
        """Write what transformers reads."""
        (folder / "chat_template.jinja").write_text(self.source, encoding="utf-8", newline="")
        if self.tool_source != self.source:
            path = folder / TEMPLATE_FOLDER / "tool_use.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.tool_source, encoding="utf-8", newline="")

    @cached_property
    def _default(self) -> jinja2.Template:
        return _environment().from_string(self.source)

    @cached_property
    def _of_tools(self) -> jinja2.Template:
        return _environment().from_string(self.tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages``: see Tokenizer.apply_chat_template."""
        rendered = [_checked(index, message) for index, message in enumerate(_checked_list(messages))]
        if continue_final_message and add_generation_prompt:
            raise RequestError("add_generation_prompt must be false with continue_final_message, got true")
        try:
            text = (self._of_tools if tools else self._default).render(
                **{**self._special_tokens, "documents": None, **variables},
                messages=rendered,
                add_generation_prompt=add_generation_prompt,
                tools=tools or None,
            )
        except Exception as error:  # a template is a program: any exception of its own is an answer to these messages
            raise RequestError(f"messages rejected by the model's chat template: {error}") from error
        return _until_the_end_of(rendered[-1]["content"], text) if continue_final_message else text


def _until_the_end_of(content: str, text: str) -> str:
    """``text`` without what the template writes after the last message, as transformers cuts it."""
    at = text.rfind(content.strip())
    if at < 0:
        raise RequestError(
            "continue_final_message cannot be served: the model's chat template changes the last message's content"
        )
    # A template may strip contents.
    end = at + len(content.strip())
    trailing = content[len(content.rstrip()) :]
    return text[: end + len(trailing)] if text.startswith(trailing, end) else text[:end]


def _checked_list(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {messages!r}")
    return messages


def _checked(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text, and calls' arguments as objects. Raises RequestError."""
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{name} must be an object, got {message!r}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{name}.role must be a string, got {role!r}")
    if content is None and ("content" in message or role == "assistant"):
        content = ""
    if isinstance(content, list | tuple):
        content = "\n".join(_text_of(f"{name}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{name}.content must be a string, got {content!r}")
    # Templates ask whether a message has calls, and OpenAI's clients write null for what it has not.
    checked = {key: value for key, value in message.items() if value is not None} | {"content": content}
    if "tool_calls" in checked:
        checked["tool_calls"] = _checked_calls(f"{name}.tool_calls", checked["tool_calls"])
    return checked


def _text_of(name: str, part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{name} must be {{'type': 'text', 'text': ...}}, got {part!r:.80}")
    return part["text"]


def _checked_calls(name: str, calls: object) -> list[dict[str, Any]]:
    """OpenAI's messages have a call's arguments as JSON text; templates, which write it themselves, as an object."""
    if not isinstance(calls, list):
        raise RequestError(f"{name} must be a list, got {calls!r:.80}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{name}[{index}] must be {{'function': {{'name': ...}}}}, got {call!r:.80}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments or "{}")
        if not isinstance(arguments, Mapping):
            raise RequestError(f"{name}[{index}].function.arguments must be a JSON object, got {arguments!r:.80}")
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body stands for itself."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The environment that Hugging Face's chat templates are written for (transformers' chat_template_utils)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
