"""``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from jaxserve.errors import RequestError
from jaxserve.openai.endpoint import Choice, Endpoint, Part, take_switch
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, Logprob

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


class ChatCompletions(Endpoint):
    path = "/v1/chat/completions"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    defaults: ClassVar[Mapping[str, Any]] = {"max_tokens": None}

    def _take_prompts(self, given: dict[str, Any], echo: bool) -> Sequence[ParsedPrompt]:
        messages = given.pop("messages", None)
        if not isinstance(messages, list):
            raise RequestError(f"messages must be a list of at least one message, got {messages!r:.80}")
        if echo:
            raise RequestError(f"echo must be false for {self.path}, got true")
        # Chats ask for log-probabilities with a switch and a number.
        wanted, num_top = take_switch(given, "logprobs"), given.pop("top_logprobs", None)
        if num_top is not None and not wanted:
            raise RequestError(f"top_logprobs needs logprobs to be true, got {num_top!r:.80} without")
        if wanted:
            given["logprobs"] = num_top or 0
        return [ParsedPrompt(messages=messages)]

    def choice(self, index: int, completion: Completion, echo: bool, tokenizer: Tokenizer) -> Choice:
        return ChatChoice(index, completion.params.logprobs or 0, tokenizer)


class ChatChoice:
    """An assistant's message."""

    def __init__(self, index: int, num_top: int, tokenizer: Tokenizer) -> None:
        self._index, self._num_top, self._tokenizer = index, num_top, tokenizer
        self._begun = False

    def whole(self, part: Part) -> dict[str, Any]:
        return self._entry({"message": {"role": "assistant", "content": part.text}}, part)

    def chunk(self, part: Part) -> dict[str, Any]:
        role = {} if self._begun else {"role": "assistant"}
        self._begun = True
        return self._entry({"delta": {**role, "content": part.text}}, part)

    def _entry(self, message: dict[str, Any], part: Part) -> dict[str, Any]:
        logprobs = None
        if part.logprobs is not None:
            logprobs = {"content": [self._position(position) for position in part.logprobs]}
        return {"index": self._index, **message, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def _position(self, position: dict[int, Logprob]) -> dict[str, Any]:
        tokens = []
        for token_id, entry in position.items():
            raw = self._tokenizer.token_bytes(token_id)
            text = raw.decode(errors="backslashreplace")
            tokens.append({"token": text, "logprob": entry.logprob, "bytes": list(raw)})
        # The first is the chosen token, which need not be among the likeliest.
        likeliest = sorted(tokens, key=itemgetter("logprob"), reverse=True)
        return {**tokens[0], "top_logprobs": likeliest[: self._num_top]}
