"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from jaxserve.errors import RequestError
from jaxserve.openai.choices import Choice, ChoicesEndpoint
from jaxserve.openai.endpoint import Ask
from jaxserve.openai.fields import take_object, take_switch
from jaxserve.openai.response import Part
from jaxserve.openai.tool_grammar import tool_grammar
from jaxserve.openai.tools import ToolCall, ToolParser, take_tools
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, FinishReason, Logprob
from jaxserve.served_model import ServedModel

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

SWITCHES = ("add_generation_prompt", "continue_final_message")
"""Of chat templates."""


class ChatCompletions(ChoicesEndpoint):
    path = "/v1/chat/completions"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}

    def _take(self, given: dict[str, Any], model: ServedModel) -> Ask:
        ask = super()._take(given, model)
        messages = given.pop("messages", None)
        if not isinstance(messages, list):
            raise RequestError(f"messages must be a list of at least one message, got {messages!r:.80}")
        if take_switch(given, "echo"):
            raise RequestError(f"echo must be false for {self.path}, got true")
        options = take_template_options(given)
        tools = take_tools(given, model.tokenizer)
        sampling = _take_logprobs(given)
        if tools is not None:
            options["tools"] = tools.schemas
            if (grammar := tool_grammar(tools, model.tokenizer)) is not None:
                if "structured_outputs" in ask.sampling:
                    raise RequestError(
                        "response_format and structured_outputs must be left out with required or strict tools, got one"
                    )
                sampling["structured_outputs"] = {"grammar": grammar}
            if tools.needs_special_tokens(model.tokenizer):
                sampling["skip_special_tokens"] = False
        return replace(
            ask,
            prompts=[ParsedPrompt(messages=messages, template_options=options)],
            sampling={**ask.sampling, **sampling},
            tools=tools,
        )

    def choice(self, index: int, completion: Completion, ask: Ask, model: ServedModel) -> Choice:
        parser = None if ask.tools is None else ToolParser(ask.tools)
        return ChatChoice(index, completion.params.logprobs or 0, model.tokenizer, parser)


def take_template_options(given: dict[str, Any]) -> dict[str, Any]:
    """Take what the chat template is rendered with, besides messages and tools, out of a body; names are vLLM's."""
    options = take_object(given, "chat_template_kwargs")
    if reserved := sorted(options.keys() & {"messages", "tools", *SWITCHES}):
        raise RequestError(f"chat_template_kwargs must not have {reserved[0]}, which is a parameter of its own")
    return options | {name: take_switch(given, name) for name in SWITCHES if name in given}


def _take_logprobs(given: dict[str, Any]) -> dict[str, Any]:
    """Chats ask for log-probabilities with a switch and a number."""
    wanted, num_top = take_switch(given, "logprobs"), given.pop("top_logprobs", None)
    if num_top is not None and not wanted:
        raise RequestError(f"top_logprobs needs logprobs to be true, got {num_top!r:.80} without")
    return {"logprobs": num_top or 0} if wanted else {}


class ChatChoice:
    """An assistant's message: text, and calls of tools where a parser looks for them."""

    def __init__(self, index: int, num_top: int, tokenizer: Tokenizer, parser: ToolParser | None) -> None:
        self._index, self._num_top, self._tokenizer, self._parser = index, num_top, tokenizer, parser
        self._begun = False

    def whole(self, part: Part) -> dict[str, Any]:
        text, calls = self._parsed(part)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.body() for call in calls]}
        return self._entry({"message": message}, part)

    def chunk(self, part: Part) -> dict[str, Any] | None:
        num_before = 0 if self._parser is None else self._parser.num_calls
        text, calls = self._parsed(part)
        if not (text or calls or part.logprobs or part.finish_reason) and self._parser is not None:
            return None
        delta: dict[str, Any] = {} if self._begun else {"role": "assistant"}
        self._begun = True
        if text or not calls:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [{"index": i, **call.body()} for i, call in enumerate(calls, num_before)]
        return self._entry({"delta": delta}, part)

    def _parsed(self, part: Part) -> tuple[str, list[ToolCall]]:
        if self._parser is None:
            return part.text, []
        return self._parser.feed(part.text, is_last=part.finish_reason is not None)

    def _entry(self, message: dict[str, Any], part: Part) -> dict[str, Any]:
        logprobs = None
        if part.logprobs is not None:
            logprobs = {"content": [self._position(position) for position in part.logprobs]}
        reason: str | None = part.finish_reason
        if reason == FinishReason.STOP and self._parser is not None and self._parser.num_calls:
            reason = "tool_calls"
        return {"index": self._index, **message, "logprobs": logprobs, "finish_reason": reason}

    def _position(self, position: Mapping[int, Logprob]) -> dict[str, Any]:
        tokens = []
        for token_id, entry in position.items():
            raw = self._tokenizer.token_bytes(token_id)
            text = raw.decode(errors="backslashreplace")
            tokens.append({"token": text, "logprob": entry.logprob, "bytes": list(raw)})
        # The first is the chosen token, which need not be among the likeliest.
        likeliest = sorted(tokens, key=itemgetter("logprob"), reverse=True)
        return {**tokens[0], "top_logprobs": likeliest[: self._num_top]}
