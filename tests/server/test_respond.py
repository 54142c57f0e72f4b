"""OpenAI's bodies over gRPC: as over HTTP, one by one and as a batch."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.batch import BatchFileError, BatchInput, BatchRun, BatchSummary, EndpointServer, ResultFile
from jaxserve.server.client import AsyncClient
from tests.batch.echo import CHAT, COMPLETIONS, line, read, write
from tests.server.conftest import RunningServer

BODIES = [
    (COMPLETIONS, {"prompt": ["ab", [5, 6, 7]], "max_tokens": 3, "n": 2, "logprobs": 1}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
]


def respond(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with AsyncClient(server.target) as client:
            return await client.respond(path, body)

    return asyncio.run(ask())


def anonymous(value: Any) -> Any:
    """A response without what no two have in common."""
    if isinstance(value, list):
        return [anonymous(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: anonymous(item) for name, item in value.items() if name not in ("id", "created", "created_at")}


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_as_over_http(make_server: Callable[..., RunningServer], path: str, body: dict[str, Any]) -> None:
    server = make_server(http_port=0)
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        wanted = json.load(answer)
    assert anonymous(respond(server, path, body)) == anonymous(wanted)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/embeddings", {}, "path must be '/v1/chat/completions' or '/v1/completions' or '/v1/responses', got"),
        (COMPLETIONS, [], "body must be a JSON object, got []"),
        (COMPLETIONS, {"prompt": "a", "stream": True}, "stream must be false, got true"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -5}, "max_tokens must be"),
    ],
)
def test_what_is_refused(server: RunningServer, fails: Callable[..., str], path: str, body: Any, message: str) -> None:
    assert message in fails(grpc.StatusCode.INVALID_ARGUMENT, lambda: respond(server, path, body))


def test_a_caller_that_goes_frees_its_requests(server: RunningServer, eventually: Callable[..., None]) -> None:
    async def leave() -> None:
        async with AsyncClient(server.target) as client:
            asking = asyncio.ensure_future(client.respond(COMPLETIONS, {"prompt": "ab", "n": 3, "max_tokens": 900}))
            await asyncio.to_thread(eventually, lambda: len(server.engine.running) == 3)
            asking.cancel()

    asyncio.run(leave())
    eventually(lambda: not server.engine.running)


def send(url: str, source: Path, destination: Path, **options: Any) -> BatchSummary:
    with BatchInput([source]) as lines, ResultFile(destination) as results:
        return BatchRun(EndpointServer(url, **options), lines, results, show_progress=False).run()


def test_a_batch(server: RunningServer, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in", line("a"), line("b", CHAT, messages=[{"role": "user", "content": "hi"}], max_tokens=3),
        line("c", prompt="x", top_p=7), line("d", prompt="x", model="other"),
    )  # fmt: skip
    summary = send(f"grpc://{server.target}", source, tmp_path / "out")
    assert (summary.num_succeeded, summary.num_errors, summary.num_output_tokens) == (2, 2, 5)
    by_id = {result["custom_id"]: result for result in read(tmp_path / "out")}
    assert by_id["a"]["response"]["body"]["choices"][0]["text"] == "xx"
    assert by_id["c"]["error"]["code"] == "invalid_request"
    assert by_id["c"]["error"]["message"].startswith("top_p must be")
    assert by_id["d"]["error"]["code"] == "not_found"


def test_a_server_that_warms_up_and_one_with_keys(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    source, keys = write(tmp_path / "in", line("a")), tmp_path / "keys"
    keys.write_text("mine\n")
    warming = make_server(ready=False)
    with pytest.raises(BatchFileError, match=r"no answer within 0.1 s: 503 .*warming up"):
        send(f"grpc://{warming.target}", source, tmp_path / "out", patience_seconds=0.1)
    keyed = make_server(api_key_file=str(keys))
    with pytest.raises(BatchFileError, match="the key is that of JAXSERVE_API_KEY"):
        send(f"grpc://{keyed.target}", source, tmp_path / "out")
    assert send(f"grpc://{keyed.target}", source, tmp_path / "out", api_key="mine").num_succeeded == 1
