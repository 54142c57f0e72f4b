"""openai: synchronous, asynchronous, streams, log-probabilities, tools, structured outputs, and errors as the classes
that its users catch."""

from __future__ import annotations

import asyncio
import json
import math
import sys

import openai

settings = json.loads(sys.argv[1])
MODEL, PROMPT, EXPECTED = settings["model"], settings["prompt"], settings["expected"]
ASKED = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": settings["max_tokens"]}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 12}


def check_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(**ASKED)
    assert whole.choices[0].text == EXPECTED, whole
    assert whole.usage.completion_tokens == settings["max_tokens"], whole.usage
    stream = client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == EXPECTED
    assert last.usage == whole.usage, last
    scored = client.completions.create(**ASKED, logprobs=2).choices[0].logprobs
    assert "".join(scored.tokens) == EXPECTED, scored
    for chosen, top in zip(scored.token_logprobs, scored.top_logprobs, strict=True):
        assert chosen == max(top.values()), (chosen, top)
    assert client.models.list().data[0].id == MODEL


def check_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert "Paris" in choice.message.content, whole
    for position in choice.logprobs.content:
        assert position.logprob == position.top_logprobs[0].logprob
        assert math.exp(position.top_logprobs[0].logprob) + math.exp(position.top_logprobs[1].logprob) <= 1
    with client.chat.completions.stream(**CHAT) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content == choice.message.content


def check_tools(client: openai.OpenAI) -> None:
    """A small model calls what it must, whole and in a stream, and reads what comes of it."""
    parameters = {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    asked = CHAT | {"tools": [tool], "max_completion_tokens": 60, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        whole = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        (call,) = whole.message.tool_calls
        assert call.function.name == "weather", whole
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome"), whole
        with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments, streamed
    answer = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    said = asked | {"messages": [*QUESTION, whole.message.model_dump(), answer], "tool_choice": "none"}
    assert client.chat.completions.create(**said).choices[0].message.content


def check_structured(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"year": {"type": "integer", "minimum": 0, "maximum": 9999}}}
    schema |= {"required": ["year"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "when", "schema": schema, "strict": True}}
    text = client.chat.completions.create(**CHAT, response_format=form).choices[0].message.content
    assert 0 <= json.loads(text)["year"] <= 9999, text
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert client.completions.create(**ASKED, extra_body=extra).choices[0].text in ("yes", "no")


def check_responses(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**asked)
    assert "Paris" in whole.output_text, whole
    with client.responses.stream(**asked) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == whole.output_text


def check_errors(client: openai.OpenAI) -> None:
    for error, message, asked in (
        (openai.BadRequestError, "temperature", ASKED | {"temperature": -1}),
        (openai.NotFoundError, "no-such-model", ASKED | {"model": "no-such-model"}),
        (openai.BadRequestError, "max_model_len", ASKED | {"prompt": PROMPT * 1000}),
    ):
        for stream in (False, True):
            try:
                client.completions.create(**asked, stream=stream)
                raise AssertionError(f"no {error.__name__} for {message}")
            except error as caught:
                said = str(caught)
            assert message in said, said


async def check_async() -> None:
    async with openai.AsyncOpenAI(base_url=settings["base_url"], api_key="none", max_retries=0) as client:

        async def streamed() -> str:
            stream = await client.completions.create(**ASKED, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(streamed() for _ in range(8)))
        assert set(texts) == {EXPECTED}, texts
        endless = await client.completions.create(**ASKED | {"max_tokens": 500}, stream=True)
        await anext(endless)
        await endless.close()


with openai.OpenAI(base_url=settings["base_url"], api_key="none", max_retries=0) as client:
    check_completions(client)
    check_chat(client)
    check_tools(client)
    check_structured(client)
    check_responses(client)
    check_errors(client)
asyncio.run(check_async())
