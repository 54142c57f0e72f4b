"""``/v1/responses``, of text: a conversation in, one message out. Nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from jaxserve.errors import RequestError
from jaxserve.openai.chat import take_template_options
from jaxserve.openai.endpoint import NO_TOOLS, Ask, Endpoint
from jaxserve.openai.fields import rename_max_tokens, take_object, take_switch
from jaxserve.openai.formats import structured_outputs
from jaxserve.openai.response import Part, Response
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, FinishReason
from jaxserve.served_model import ServedModel

TEXT_PARTS = ("input_text", "output_text", "text")
"""Types of parts of a content."""
OTHERS = ("best_of", "logprobs", "max_tokens", "n")
"""What other endpoints call what this one has not, or calls otherwise."""


class Responses(Endpoint):
    path = "/v1/responses"
    id_prefix = "resp_"
    names_events = True
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NO_TOOLS,
        "background": (False,),
        "include": ([],),
        "truncation": ("disabled",),
        "top_logprobs": (0,),
    }
    defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}

    def _take(self, given: dict[str, Any], model: ServedModel) -> Ask:
        messages = _messages(given.pop("input", None))
        instructions = given.pop("instructions", None)
        if not isinstance(instructions, str | None):
            raise RequestError(f"instructions must be a string, got {instructions!r:.80}")
        if instructions:
            messages.insert(0, {"role": "system", "content": instructions})
        for name in OTHERS:
            if name in given:
                raise RequestError(f"{name} is no parameter of {self.path}, got {given[name]!r:.80}")
        rename_max_tokens(given, "max_output_tokens")
        prompt = ParsedPrompt(messages=messages, template_options=take_template_options(given))
        text_format = take_object(take_object(given, "text"), "format") or {"type": "text"}
        sampling: dict[str, Any] = {}
        if structured := structured_outputs("text.format", text_format):
            if "structured_outputs" in given:
                raise RequestError(f"text.format must be left out with structured_outputs, got {text_format!r:.80}")
            sampling["structured_outputs"] = structured
        return Ask(prompts=[prompt], sampling=sampling, stream=take_switch(given, "stream"), text_format=text_format)

    def respond(self, ask: Ask, completions: Sequence[Completion], response_id: str, model: ServedModel) -> Response:
        return TextResponse(ask, completions, response_id, model)


def _messages(value: object) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RequestError(f"input must be a string or a list of messages, got {value!r:.80}")
    return [_message(f"input[{index}]", item) for index, item in enumerate(value)]


def _message(name: str, item: object) -> dict[str, Any]:
    if not isinstance(item, Mapping) or item.get("type", "message") != "message":
        raise RequestError(f"{name} must be a message, {{'role': ..., 'content': ...}}, got {item!r:.80}")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise RequestError(f"{name}.role must be a string, got {role!r:.80}")
    if isinstance(content, list):
        content = [_text_part(f"{name}.content[{index}]", part) for index, part in enumerate(content)]
    elif not isinstance(content, str):
        raise RequestError(f"{name}.content must be a string or a list of parts, got {content!r:.80}")
    return {"role": role, "content": content}


def _text_part(name: str, part: object) -> dict[str, str]:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS else None
    if not isinstance(text, str):
        raise RequestError(f"{name} must be {{'type': 'input_text', 'text': ...}}, got {part!r:.80}")
    return {"type": "text", "text": text}


class TextResponse(Response):
    """One message of one text."""

    def __init__(self, ask: Ask, completions: Sequence[Completion], response_id: str, model: ServedModel) -> None:
        super().__init__(ask, completions, response_id, model)
        self._params = completions[0].params
        self._message_id = response_id.replace("resp_", "msg_", 1)
        self._place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        self._num_events = 0
        self._texts: list[str] = []
        self._finish_reason: FinishReason | None = None

    def _whole(self) -> dict[str, Any]:
        (completion,) = self.completions
        self._texts, self._finish_reason = [completion.text], completion.finish_reason
        return self._body()

    def first_events(self) -> Iterator[dict[str, Any]]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._body())
        yield self._event("response.output_item.added", output_index=0, item=self._message([]))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def _events(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        self._texts.append(part.text)
        self._finish_reason = part.finish_reason
        if part.text:
            yield self._event("response.output_text.delta", **self._place, delta=part.text, logprobs=[])

    def last_events(self) -> Iterator[dict[str, Any]]:
        text, body = "".join(self._texts), self._body()
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=self._message([_part(text)]))
        yield self._event(f"response.{body['status']}", response=body)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": name, "sequence_number": self._num_events - 1, **fields}

    @property
    def _status(self) -> str:
        if self._finish_reason is None:
            return "in_progress"
        return "completed" if self._finish_reason is FinishReason.STOP else "incomplete"

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message_id, "type": "message", "role": "assistant", "status": self._status, "content": content,
        }  # fmt: skip

    def _body(self) -> dict[str, Any]:
        ended = self._finish_reason is not None
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "model": self.model.names[0],
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "output": [self._message([_part("".join(self._texts))])] if ended else [],
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "max_output_tokens": self._params.max_tokens,
            "text": {"format": self.ask.text_format},
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "output_tokens": self.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
