"""The HTTP door over a fake engine, mostly through OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import openai
import pytest

from jaxserve.openai import schema
from jaxserve.openai.endpoint import SAMPLING
from jaxserve.server.keys import VARIABLE
from tests.server.conftest import RunningServer

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(http_port=0)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def send(
    server: RunningServer, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """The status, headers and body that answer; ``body`` may be bytes."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    data = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, {k.lower(): v for k, v in response.headers.items()}, json.loads(text) if is_json else text


def error_of(answer: tuple[int, dict[str, str], Any], status: int) -> str:
    assert answer[0] == status, answer
    error = answer[2]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


def test_completions(client: openai.OpenAI) -> None:
    done = client.completions.create(model="fake", prompt="abc", max_tokens=3)
    assert (done.object, done.model, done.choices[0].text) == ("text_completion", "fake", "xxx")
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 3, 6)


def test_several_prompts_and_choices(client: openai.OpenAI) -> None:
    """Texts or token ids; choices by prompt, then by number; each prompt counted once."""
    for prompts in (["a", "bc"], [[97], [98, 99]]):
        done = client.completions.create(model="fake", prompt=prompts, n=2, max_tokens=2, echo=True)
        assert [choice.text for choice in done.choices] == ["axx", "axx", "bcxx", "bcxx"]
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 8)


def test_the_best_of_several(client: openai.OpenAI) -> None:
    done = client.completions.create(model="fake", prompt=["a", "bc"], best_of=3, n=2, max_tokens=2)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in done.choices)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 12), "all that have been made"


def test_choices_have_seeds_of_their_own(server: RunningServer, client: openai.OpenAI) -> None:
    seeds = []
    add = server.engine.add_request

    def spy(request_id: str, token_ids: list[int], params: Any, *rest: Any) -> None:
        seeds.append(params.seed)
        add(request_id, token_ids, params, *rest)

    server.engine.add_request = spy  # type: ignore[method-assign]
    client.completions.create(model="fake", prompt="a", n=3, max_tokens=1, seed=2**31 - 2)
    assert sorted(seeds) == [0, 2**31 - 2, 2**31 - 1]


def test_echo_with_logprobs_has_the_prompt_and_one_more(client: openai.OpenAI) -> None:
    """As lm-eval asks for it; a prompt's first token has none."""
    done = client.completions.create(model="fake", prompt=[[97, 98], [99]], echo=True, max_tokens=1, logprobs=1)
    first, second = (choice.logprobs for choice in done.choices)
    assert first is not None
    assert second is not None
    assert first.tokens == ["a", "b", "x"]
    assert first.token_logprobs == [None, -0.5, -0.5]
    assert first.top_logprobs is not None
    assert first.top_logprobs[1:] == [{"x": -0.5, "y": -1.5}] * 2
    assert first.text_offset == [0, 1, 2]
    assert second.tokens == ["c", "x"]


def test_streams(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="fake", prompt="abc", max_tokens=3, stream=True, echo=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abcxxx"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("continuous", [False, True])
def test_chat_streams_with_usage(client: openai.OpenAI, continuous: bool) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": continuous}
    stream = client.chat.completions.create(
        model="fake",
        messages=CHAT,
        n=2,
        max_completion_tokens=3,
        stream=True,
        stream_options=options,  # type: ignore[arg-type]
    )
    texts, roles, usages = {0: "", 1: ""}, [], []
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.append(choice.delta.role)
    assert texts == {0: "xxx", 1: "xxx"}
    assert sum(role == "assistant" for role in roles) == 2
    *during, last = usages
    assert last is not None
    assert (last.prompt_tokens, last.completion_tokens) == (8, 6)
    assert all((usage is not None) == continuous for usage in during)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="fake",
        messages=CHAT,
        max_tokens=1,
        logprobs=True,
        top_logprobs=2,  # type: ignore[arg-type]
    )
    assert done.choices[0].message.content == "x"
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["x", "y"]


def test_content_as_parts_and_vllms_fields(client: openai.OpenAI) -> None:
    extra = {"top_k": 3, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [5], "skip_special_tokens": False}
    done = client.completions.create(model="fake", prompt="a", max_tokens=2, extra_body=extra)
    assert done.choices[0].text == "xx"


def test_models_and_aliases(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, served_model_name="one,two")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["one", "two"]
        assert client.models.retrieve("two").id == "two"
        assert client.completions.create(model="two", prompt="a", max_tokens=1).model == "one"
        with pytest.raises(openai.NotFoundError, match="model must be 'one' or 'two'") as caught:
            client.completions.create(model="fake", prompt="a")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("fake")


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    _, _, body = send(server, "POST", "/tokenize", {"model": "fake", "prompt": "abc", "return_token_strs": True})
    assert body == {"count": 3, "max_model_len": 1000, "tokens": [97, 98, 99], "token_strs": ["a", "b", "c"]}
    _, _, body = send(server, "POST", "/tokenize", {"messages": CHAT})
    assert body["count"] == 8
    assert send(server, "POST", "/detokenize", {"tokens": [97, 98]})[2] == {"prompt": "ab"}


def test_probes_metrics_and_version(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, ready=False)
    assert send(server, "GET", "/health")[0] == HTTPStatus.OK
    assert error_of(send(server, "GET", "/ready"), 503) == "the server is warming up or draining"
    answer = send(server, "POST", "/v1/completions", {"prompt": "a"})
    assert error_of(answer, 503) == "the server is warming up"
    assert "retry-after" in answer[1]
    server.set_ready()
    assert send(server, "GET", "/ready")[0] == HTTPStatus.OK
    assert send(server, "GET", "/metrics")[1]["content-type"].startswith("text/plain")
    assert set(send(server, "GET", "/version")[2]) == {"version"}
    assert "/v1/chat/completions" in send(server, "GET", "/openapi.json")[2]["paths"]


# ---- bad requests: each fails alone

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
BAD = [
    (COMPLETIONS, b"{", "body must be JSON: "),
    (COMPLETIONS, b"\xff", "body must be JSON: "),
    (COMPLETIONS, b"[" * 100_000, "body must be JSON: "),
    (COMPLETIONS, [1], "body must be a JSON object, got [1]"),
    (COMPLETIONS, {}, "prompt must be a string, a list of token ids, or a list of those, got None"),
    (COMPLETIONS, {"prompt": []}, "prompt must be a string, a list of token ids, or a list of those, got []"),
    (COMPLETIONS, {"prompt": [[1], "a", 5]}, "prompt must be a string, a list of token ids, or a list of those"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt must be a list of at most 128 prompts, got 129"),
    (COMPLETIONS, {"prompt": ""}, "prompt must hold at least one token, got none"),
    (COMPLETIONS, {"prompt": "a" * 1001}, "prompt of 1001 tokens exceeds max_model_len 1000"),
    (COMPLETIONS, {"prompt": ["a", "a" * 1000]}, "prompt of 1000 tokens exceeds max_model_len 1000"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n must be an integer in [1, 128], got 0"),
    (COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 1}, "best_of must be an integer in [2, 128], got 1"),
    (COMPLETIONS, {"prompt": "a", "n": 1e9}, "n must be an integer in [1, 128], got 1000000000.0"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "stream must be false with a best_of over n, got"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream must be true or false, got 'yes'"),
    (COMPLETIONS, {"prompt": "a", "stream_options": 1}, "stream_options must be an object, got 1"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix must be '', got 'b'"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens must be an integer in [1, 2147483647], got 0"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature must be in [0, 100], got 'hot'"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias must be in [-100, 100], got 101"),
    (COMPLETIONS, {"prompt": "a", "beams": 2}, "unknown parameter 'beams' for /v1/completions; known: allowed_"),
    (CHATS, {"messages": "hi"}, "messages must be a list of at least one message, got 'hi'"),
    (CHATS, {"messages": CHAT, "echo": True}, "echo must be false for /v1/chat/completions, got true"),
    (CHATS, {"messages": [{}] * 1001}, "messages of 1001 items exceeds max_model_len 1000"),
    ("/tokenize", {}, "prompt must be a text, or messages a list, and not both, got {}"),
    ("/tokenize", {"prompt": "a", "x": 1}, "unknown parameter 'x' for /tokenize; known: add_generation_prompt, chat_"),
    ("/detokenize", {"tokens": ["a"]}, "tokens must be a list of token ids, got ['a']"),
    ("/detokenize", {"tokens": [-1]}, "token_ids must be in [0, 159], got -1"),
]  # fmt: skip


def test_bad_requests_fail_alone(server: RunningServer, eventually: Callable[..., None]) -> None:
    for path, body, message in BAD:
        assert error_of(send(server, "POST", path, body), 400).startswith(message), (path, body)
    assert error_of(send(server, "GET", "/nothing"), 404) == "Not Found"
    assert error_of(send(server, "GET", COMPLETIONS), 405) == "Method Not Allowed"
    assert error_of(send(server, "POST", COMPLETIONS, {"prompt": "a", "model": "gpt"}), 404).startswith("model must be")
    for secret in ("break", [1]):
        assert error_of(send(server, "POST", COMPLETIONS, {"prompt": secret}), 500) == "internal error"
    assert send(server, "POST", COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == HTTPStatus.OK
    eventually(lambda: not server.admission.num_active)


def test_a_fault_is_logged_once(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    assert send(server, "POST", COMPLETIONS, {"prompt": "break"})[0] == HTTPStatus.INTERNAL_SERVER_ERROR
    assert caplog.text.count("uncaught exception in an HTTP request") == 1


def test_the_description_has_every_parameter_of_sampling() -> None:
    assert {*schema.COMMON, *schema.COMPLETION} >= SAMPLING


def test_a_body_over_the_limit(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, max_message_bytes=1000)
    answer = send(server, "POST", COMPLETIONS, {"prompt": "a" * 2000})
    assert error_of(answer, 413) == "body must have at most max_message_bytes, 1000, got more"


def test_a_full_queue_says_when_to_come_back(make_server: Callable[..., RunningServer]) -> None:
    """Each choice counts as one."""
    server = make_server(http_port=0, max_waiting=3)
    answer = send(server, "POST", COMPLETIONS, {"prompt": "a", "n": 4})
    assert "max_waiting requests are in flight, the limit is 3" in error_of(answer, 429)
    assert int(answer[1]["retry-after"]) >= 1
    assert send(server, "POST", COMPLETIONS, {"prompt": "a", "n": 3, "max_tokens": 1})[0] == HTTPStatus.OK


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_disconnect_aborts_at_once(
    server: RunningServer, eventually: Callable[..., None], stream: bool, n: int
) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 900, "stream": stream, "n": n}).encode()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        eventually(lambda: len(server.engine.running) == n)
    eventually(lambda: len(server.engine.aborted) == n)
    eventually(lambda: not server.admission.num_active)


def test_names_go_in_and_out(
    server: RunningServer, caplog: pytest.LogCaptureFixture, eventually: Callable[..., None]
) -> None:
    with caplog.at_level("DEBUG", logger="jaxserve.server.calls"):
        assert send(server, "GET", "/health", headers={"X-Request-Id": "mine-7"})[1]["x-request-id"] == "mine-7"
        eventually(lambda: "mine-7 - GET '/health': 200 in" in caplog.text)
        for bad in ("", "a" * 200, "two words"):
            assert len(send(server, "GET", "/nothing", headers={"X-Request-Id": bad})[1]["x-request-id"]) == 32
        send(server, "GET", "/forged%0Aline")
        eventually(lambda: "- GET '/forged\\nline': 404 in" in caplog.text)


def test_keys(make_server: Callable[..., RunningServer], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\nsecond\n")
    monkeypatch.setenv(VARIABLE, "third fourth")
    server = make_server(http_port=0, api_key_file=str(file))
    body = {"prompt": "a", "max_tokens": 1}

    def status(header: str | None, path: str = COMPLETIONS, method: str = "POST") -> int:
        return send(server, method, path, body, {} if header is None else {"Authorization": header})[0]

    for key in ("first", "second", "third", "fourth"):
        assert status(f"Bearer {key}") == HTTPStatus.OK
    for header in (None, "", "Bearer", "Bearer ", "Bearer firs", "Bearer # ours", "Basic first", "first", "Bearer é"):
        assert status(header) == HTTPStatus.UNAUTHORIZED, header
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/debug/steps"):
        assert status(None, path, "GET") == HTTPStatus.UNAUTHORIZED
    assert status(None, "/health", "GET") == HTTPStatus.OK
    file.write_text("fifth\n")
    server.server.keys.reload()
    assert (status("Bearer fifth"), status("Bearer first"), status("Bearer third")) == (200, 401, 200)
    file.write_text("")
    server.server.keys.reload()
    assert status("Bearer fifth") == HTTPStatus.OK, "a file without keys opens nothing"


PAGE = "https://app.example"


def cors(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-")}


def preflight(server: RunningServer, origin: str = PAGE) -> tuple[int, dict[str, str], Any]:
    """What a browser asks before it sends a POST with a key."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return send(server, "OPTIONS", COMPLETIONS, headers={"Origin": origin, **asked})


def test_other_origins_may_not_call_unless_allowed(server: RunningServer) -> None:
    for answer in (preflight(server), send(server, "GET", "/v1/models", headers={"Origin": PAGE})):
        assert not cors(answer[1])


@pytest.mark.parametrize("allowed", [f"http://localhost:3000,{PAGE}", "*"])
def test_allowed_origins(make_server: Callable[..., RunningServer], tmp_path: Any, allowed: str) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    server = make_server(http_port=0, api_key_file=str(file), allowed_origins=allowed, ready=False)
    origin = "*" if allowed == "*" else PAGE
    status, headers, _ = preflight(server)
    assert status == HTTPStatus.OK, "no browser sends a key with it"
    assert headers["access-control-allow-origin"] == origin
    assert "authorization" in headers["access-control-allow-headers"].lower()
    assert "POST" in headers["access-control-allow-methods"]
    for path, key, wanted in (("/v1/models", "wrong", 401), ("/v1/models", "secret", 503), ("/version", "secret", 200)):
        answer = send(server, "GET", path, headers={"Origin": PAGE, "Authorization": f"Bearer {key}"})
        assert answer[0] == wanted
        assert answer[1]["access-control-allow-origin"] == origin, "a page must be able to read errors"
        assert answer[1]["access-control-expose-headers"] == "X-Request-Id, Retry-After"
    if origin == PAGE:
        assert "access-control-allow-origin" not in preflight(server, "https://other.example")[1]


# ---- the end of an engine, and of the server


def test_requests_that_are_aborted_from_elsewhere(server: RunningServer, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="abc", max_tokens=900, stream=True)
    next(iter(stream))
    (request_id,) = server.engine.running
    assert server.call(server.admission.replicas().abort(request_id))
    with pytest.raises(openai.APIError, match="the request was aborted"):
        list(stream)


def test_an_engine_that_fails(server: RunningServer, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="abc", max_tokens=900, stream=True)
    next(iter(stream))
    server.engine.step_error = RuntimeError("secret")
    with pytest.raises(openai.APIError, match="the engine has stopped"):
        list(stream)
    for path, method in ((COMPLETIONS, "POST"), ("/health", "GET"), ("/ready", "GET")):
        assert send(server, method, path, {"prompt": "a"})[0] == HTTPStatus.SERVICE_UNAVAILABLE


def test_a_drain_lets_streams_end(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, drain_seconds=20)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="fake", prompt="abc", max_tokens=60, stream=True)
        next(iter(stream))
        shutdown = server.submit(server.server.shutdown())
        time.sleep(0.05)
        assert send(server, "GET", "/ready")[0] == HTTPStatus.SERVICE_UNAVAILABLE
        with pytest.raises(openai.InternalServerError, match="the server is draining"):
            client.completions.create(model="fake", prompt="a")
        assert len(list(stream)) == 59
    shutdown.result(timeout=30)


def test_many_at_once(server: RunningServer, eventually: Callable[..., None]) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(model="fake", prompt="a", max_tokens=number, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(1, 41)))

    assert [len(text) for text in asyncio.run(run())] == list(range(1, 41))
    eventually(lambda: not server.admission.num_active)
