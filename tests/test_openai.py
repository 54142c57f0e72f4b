"""OpenAI's bodies without a file or a server around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jaxserve.errors import RequestError
from jaxserve.openai import CHAT, COMPLETIONS, RESPONSES, Ask, Endpoint
from jaxserve.prompts import ParsedPrompt
from jaxserve.request import Completion, FinishReason, Logprob, RequestDelta, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.served_model import ServedModel
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer

BYTES = Tokenizer.of_bytes()
MODEL = ServedModel(("bytes", "alias"), BYTES, max_model_len=100, vocab_size=256, sampling_defaults={})


class ChatTokenizer:
    """One token a character, and a template of nothing but the contents."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in ("^" if add_special_tokens else "") + text]

    def check(self, text: str) -> None:
        """Takes all."""

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "".join(message["content"] for message in messages)

    def decode_stream(self, skip_special_tokens: bool, after: list[int]) -> Any:
        return SimpleNamespace(step=chr)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


CHATTING = replace(MODEL, tokenizer=ChatTokenizer())  # type: ignore[arg-type]
MESSAGES = [{"role": "user", "content": "hi"}]


def parse(endpoint: Endpoint, served: ServedModel = CHATTING, /, **body: Any) -> tuple[list[int], SamplingParams]:
    (one,) = endpoint.completions(endpoint.parse(body, served), "id", served)
    return one.prompt_token_ids, one.params


def completion(
    token_ids: Sequence[int], text: str, logprobs: list[dict[int, Logprob]] | None, num_top: int | None
) -> Completion:
    """An ended one whose prompt is one token."""
    collected = Completion("cmpl-1", [7], SamplingParams(logprobs=num_top))
    collected.add(
        RequestDelta(
            request_id="cmpl-1",
            token_ids=list(token_ids),
            text=text,
            logprobs=logprobs,
            prompt_logprobs=None,
            finish_reason=FinishReason.LENGTH,
            stop_reason=None,
            metrics=RequestMetrics(arrival_seconds=0.0, num_cached_tokens=4),
            num_prompt_tokens=1,
        )
    )
    return collected


def whole(endpoint: Endpoint, completions: Sequence[Completion], model: ServedModel = MODEL) -> dict[str, Any]:
    """Of as many prompts."""
    prompts = [ParsedPrompt("")] * len(completions)
    return endpoint.respond(Ask(prompts), completions, "cmpl-1", model).whole()


def logprobs_of(endpoint: Endpoint, one: Completion, model: ServedModel = MODEL) -> dict[str, Any]:
    (choice,) = whole(endpoint, [one], model)["choices"]
    logprobs: dict[str, Any] = choice["logprobs"]
    return logprobs


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        (COMPLETIONS, {"prompt": "hello"}, SamplingParams(temperature=0.5, top_k=9, max_tokens=7)),
        (COMPLETIONS, {"prompt": "a", "temperature": 1.0, "top_k": None}, SamplingParams(top_k=9, max_tokens=7)),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 50}, SamplingParams(temperature=0.5, top_k=9, max_tokens=50)),
        (CHAT, {"messages": []}, SamplingParams(temperature=0.5, top_k=9, max_tokens=7)),
        (COMPLETIONS, {"prompt": [5] * 97}, SamplingParams(temperature=0.5, top_k=9, max_tokens=3)),
    ],
)
def test_the_body_wins_over_the_models_defaults(
    endpoint: Endpoint, body: dict[str, Any], expected: SamplingParams
) -> None:
    model = replace(CHATTING, sampling_defaults={"temperature": 0.5, "top_k": 9, "max_tokens": 7})
    assert parse(endpoint, model, **body)[1] == expected


def test_prompts_and_limits_of_the_two_endpoints() -> None:
    """Completions begin as any text, and have a default limit; a template writes its special tokens itself."""
    assert parse(COMPLETIONS, prompt="hi") == ([*map(ord, "^hi")], SamplingParams())
    assert parse(CHAT, messages=MESSAGES) == ([*map(ord, "hi")], SamplingParams(max_tokens=None))


def test_models_have_several_names() -> None:
    for name in MODEL.names:
        assert parse(COMPLETIONS, prompt="hi", model=name) == parse(COMPLETIONS, prompt="hi")
    with pytest.raises(RequestError, match="model must be 'bytes' or 'alias', which is served here, got 'gpt'"):
        parse(COMPLETIONS, prompt="hi", model="gpt")


def test_errors_say_where_they_are() -> None:
    with pytest.raises(RequestError, match="suffix must be '', got 'x'"):
        parse(COMPLETIONS, prompt="hi", suffix="x")


def test_a_response_has_every_choice_and_all_tokens() -> None:
    one, other = completion([5], "x", None, None), completion([5, 6], "xy", None, None)
    response = whole(COMPLETIONS, [one, other])
    del response["created"]
    assert response == {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "bytes",
        "choices": [
            {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"},
            {"index": 1, "text": "xy", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 8},
        },
    }


def test_logprobs_of_parts_of_a_character() -> None:
    """Two bytes that are no characters alone: both would be written U+FFFD, and one would hide the other."""
    token_ids = BYTES.encode("é👋")
    entries = [{token_id: Logprob(-5.0 - i, 2), 5: Logprob(-0.5, 1)} for i, token_id in enumerate(token_ids)]
    entries[0] |= {token_ids[2]: Logprob(-1.0, 3)}
    one = completion(token_ids, "é👋", entries, 1)
    logprobs = logprobs_of(COMPLETIONS, one)
    assert logprobs["tokens"][:3] == [r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xf0"]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1]
    five = BYTES.decode([5])
    assert logprobs["top_logprobs"][0] == {five: -0.5, r"bytes:\xf0": -1.0, r"bytes:\xc3": -5.0}
    for token, value, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == value, "the chosen token is among them, under its own name"
    content = logprobs_of(CHAT, one)["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "é👋"
    assert (content[0]["token"], content[0]["top_logprobs"][0]["token"]) == (r"\xc3", five)


def test_logprobs_of_tokens_with_one_text() -> None:
    """The likeliest of them is told, wherever it stands: evaluations compare the chosen one with the greatest."""

    class Twins(ChatTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"twin"

    one = completion([1], "twin", [{1: Logprob(-5, 2), 2: Logprob(-0.1, 1)}], 2)
    model = replace(MODEL, tokenizer=Twins())  # type: ignore[arg-type]
    assert logprobs_of(COMPLETIONS, one, model)["top_logprobs"] == [{"twin": -0.1}]


def test_offsets_end_where_a_stop_string_cut_the_text() -> None:
    one = completion([*map(ord, "xEN")], "x", [{ord(c): Logprob(-1.0, 1)} for c in "xEN"], 0)
    assert logprobs_of(COMPLETIONS, one, CHATTING)["text_offset"] == [0, 1, 1]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
STRUCTURED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
     {"json": SCHEMA}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
    ({"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), STRUCTURED)
def test_structured_outputs(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse(COMPLETIONS, prompt="hi", **fields)[1].structured_outputs == StructuredOutputsParams(**expected)
    assert parse(CHAT, messages=MESSAGES, **fields)[1].structured_outputs == StructuredOutputsParams(**expected)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputsParams(json_object=True)),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    ],
)
def test_structured_responses(format: dict[str, Any], expected: StructuredOutputsParams | None) -> None:
    ask = RESPONSES.parse({"input": "hi", "text": {"format": format}}, CHATTING)
    (one,) = RESPONSES.completions(ask, "resp_1", CHATTING)
    assert one.params.structured_outputs == expected
    answer = RESPONSES.respond(ask, [completion([120], "x", None, None)], "resp_1", CHATTING).whole()
    assert answer["text"] == {"format": format}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of text, json_object, json_schema, s"),
        ({"response_format": "json"}, "response_format must be an object, got 'json'"),
        ({"response_format": {"type": "json_schema"}}, "response_format must be {'name': ..., 'schema': ...}, got {'t"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format.json_schema.schema at # has 'not', a keyword that cannot be served and must be left out"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
         "response_format must be left out with structured_outputs, got {'type': 'json_object'}"),
        ({"structured_outputs": "a"}, "structured_outputs must be an object, got 'a'"),
        ({"structured_outputs": {"guided": "a"}}, "unknown field 'guided' of structured_outputs; known: json, regex, "),
        ({"guided_regex": "a"}, "unknown parameter 'guided_regex' for"),
    ],
)  # fmt: skip
def test_bad_formats(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CHAT, messages=MESSAGES, **fields)
    assert str(caught.value).startswith(message)


NEUTRAL_FIELDS = {
    "user": "u-1", "metadata": {"run": "7"}, "store": True, "service_tier": "flex", "safety_identifier": "s",
    "prompt_cache_key": "k", "parallel_tool_calls": True, "stream_options": {"include_usage": True},
    "logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "n": 1, "best_of": 1,
    "stream": False, "echo": False, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": None, "seed": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL_FIELDS)
def test_fields_that_change_nothing_are_taken(name: str) -> None:
    bodies: list[tuple[Endpoint, dict[str, Any]]] = [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": MESSAGES})]
    for endpoint, body in bodies:
        assert parse(endpoint, **{**body, name: NEUTRAL_FIELDS[name]}) == parse(endpoint, **body)
