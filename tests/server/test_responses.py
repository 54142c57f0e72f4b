"""``/v1/responses`` over a fake engine, through OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import RunningServer
from tests.server.test_http import client, server

__all__ = ["client", "server"]  # fixtures
SCHEMA = {"type": "function", "name": "time", "parameters": {}}


def test_a_text(client: openai.OpenAI) -> None:
    done = client.responses.create(model="fake", input="hi", max_output_tokens=3, temperature=0.5)
    assert (done.output_text, done.status, done.model, done.temperature) == ("xxx", "incomplete", "fake", 0.5)
    assert done.incomplete_details is not None
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.id.startswith("resp_")
    assert done.usage is not None
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (8, 3, 11)
    stopped = client.responses.create(model="fake", input="hi", extra_body={"stop": ["x"], "top_k": 3})
    assert (stopped.status, stopped.incomplete_details) == ("completed", None)


def test_conversations(server: RunningServer, client: openai.OpenAI) -> None:
    """Instructions go first; texts come in parts of several types."""
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]
    done = client.responses.create(model="fake", input=items, instructions="Be brief.", max_output_tokens=1)
    assert done.usage is not None
    contents = [[{"type": "text", "text": "a"}], [{"type": "text", "text": "b"}], "c"]
    rendered = "<system>Be brief." + "".join(f"<{item['role']}>{c}" for item, c in zip(items, contents, strict=True))
    assert done.usage.input_tokens == len(rendered)


def test_a_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="fake", input="hi", max_output_tokens=2, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(model="fake", input="hi", extra_body={"stop": ["x"]}) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == "x"
    assert final.usage is not None
    assert (final.status, final.usage.output_tokens) == ("completed", 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "input must be a string or a list of messages, got []"),
        ({"input": [{"type": "reasoning"}]}, "input[0] must be a message, {'role': ..., 'content': ...}, got {'type'"),
        ({"input": [{"role": 1, "content": "a"}]}, "input[0].role must be a string, got 1"),
        ({"input": [{"role": "user"}]}, "input[0].content must be a string or a list of parts, got None"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0] must be {'type': 'input_text', 'text': ...}, got {'type': 'input_image'}",
        ),
        ({"instructions": 1}, "instructions must be a string, got 1"),
        ({"previous_response_id": "resp_1"}, "unknown parameter 'previous_response_id' for /v1/responses; known: "),
        ({"tools": [SCHEMA]}, "tools must be [], got [{'type': 'function'"),
        (
            {"text": {"format": {"type": "xml"}}},
            "text.format.type must be one of text, json_object, json_schema, structural_tag, got 'xml'",
        ),
        ({"background": True}, "background must be False, got True"),
        ({"max_tokens": 3}, "max_tokens is no parameter of /v1/responses, got 3"),
        ({"max_output_tokens": 0}, "max_output_tokens must be an integer in [1, 2147483647], got 0"),
    ],
)
def test_bad_requests(client: openai.OpenAI, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="fake", input="hi", extra_body=body)
    assert caught.value.body["message"].startswith(message)  # type: ignore[index]


def test_a_failure_in_mid_stream(server: RunningServer, client: openai.OpenAI) -> None:
    stream = client.responses.create(model="fake", input="hi", max_output_tokens=900, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    server.engine.step_error = RuntimeError("secret")
    with pytest.raises(openai.APIError, match="the engine has stopped"):
        list(stream)
