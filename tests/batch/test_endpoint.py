"""Batches that a server serves, over HTTP; those over gRPC: tests/server/test_respond.py."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jaxserve.batch import BatchFileError, BatchInput, BatchRun, BatchSummary, EndpointServer, ResultFile
from jaxserve.engine.call_thread import CallThread
from tests.batch.echo import CHAT, line, read, write

Reply = Callable[[dict[str, Any], dict[str, str]], tuple[int, Any]]


class Server:
    """Answers every body as ``reply`` does, and keeps what it has seen."""

    def __init__(self) -> None:
        self.reply: Reply = lambda body, headers: (200, {"usage": {"prompt_tokens": 2, "completion_tokens": 3}})
        self.paths: list[str] = []
        self.num_at_once = self.most_at_once = 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.paths.append(self.path)
                    outer.num_at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.num_at_once)
                status, answer = outer.reply(body, {key.lower(): value for key, value in self.headers.items()})
                with lock:
                    outer.num_at_once -= 1
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def send(url: str, source: Path, destination: Path, **options: Any) -> BatchSummary:
    with BatchInput([source]) as lines, ResultFile(destination) as results:
        return BatchRun(EndpointServer(url, **options), lines, results, show_progress=False).run()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_lines_go_to_their_paths(server: Server, tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / "in", line("a"), line("b", CHAT, messages=[]), "{", line("c", stream=True), line("d"))
    summary = send(server.url + suffix, source, tmp_path / "out", concurrency=2)
    assert sorted(server.paths) == ["/v1/chat/completions", "/v1/completions", "/v1/completions"]
    assert (summary.num_succeeded, summary.num_errors, summary.budget_use) == (3, 2, None)
    assert (summary.num_prompt_tokens, summary.num_output_tokens) == (6, 9)
    by_id = {result["id"]: result for result in read(tmp_path / "out")}
    assert by_id["batch_req_1"]["response"]["body"] == {"usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    assert by_id["batch_req_4"]["error"]["message"] == "stream must be false in a batch, got true"
    assert send(server.url, source, tmp_path / "out").num_skipped == 5


@pytest.mark.parametrize(
    ("status", "body", "code", "message"),
    [
        (400, {"error": {"message": "n must be 1", "code": "x"}}, "invalid_request", "n must be 1"),
        (404, {"error": {"message": "no such model"}}, "not_found", "no such model"),
        (500, b"oops", "internal_server_error", "oops"),
        (499, {"error": {"message": "the request was aborted"}}, "status_499", "the request was aborted"),
        (422, ["what"], "unprocessable_entity", '["what"]'),
    ],
)
def test_errors_fail_alone(server: Server, tmp_path: Path, status: int, body: Any, code: str, message: str) -> None:
    server.reply = lambda asked, headers: (status, body) if asked["prompt"] == "bad" else (200, {})
    source = write(tmp_path / "in", line("a", prompt="bad"), line("b", prompt="good"))
    assert send(server.url, source, tmp_path / "out").num_errors == 1
    by_id = {result["custom_id"]: result for result in read(tmp_path / "out")}
    assert by_id["a"]["error"] == {"code": code, "message": message}
    assert by_id["a"]["response"] == {"status_code": status, "request_id": "batch_req_1", "body": None}
    assert by_id["b"]["error"] is None


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    statuses = iter([503, 429, 200])
    server.reply = lambda body, headers: (next(statuses), {"error": {"message": "busy"}})
    assert send(server.url, write(tmp_path / "in", line("a")), tmp_path / "out").num_succeeded == 1


def test_a_server_that_stays_away_ends_the_run(server: Server, tmp_path: Path) -> None:
    source = write(tmp_path / "in", line("a"))
    server.reply = lambda body, headers: (503, {"error": {"message": "it drains"}})
    with pytest.raises(BatchFileError, match=r"no answer within 0.1 s: 503 .*it drains"):
        send(server.url, source, tmp_path / "out", patience_seconds=0.1)
    with pytest.raises(BatchFileError, match=r"http://127.0.0.1:1: no answer within 0.1 s: ConnectError"):
        send("http://127.0.0.1:1", source, tmp_path / "out", patience_seconds=0.1)
    assert read(tmp_path / "out") == []


def test_keys(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body, headers: (200 if headers.get("authorization") == "Bearer mine" else 401, {})
    source = write(tmp_path / "in", line("a"))
    with pytest.raises(BatchFileError, match="the key is that of JAXSERVE_API_KEY"):
        send(server.url, source, tmp_path / "out")
    assert send(server.url, source, tmp_path / "out", api_key="mine").num_succeeded == 1


def test_so_many_at_once_and_an_interrupt(server: Server, tmp_path: Path) -> None:
    def slow(body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
        time.sleep(0.02)
        return 200, {}

    server.reply = slow
    source = write(tmp_path / "in", *(line(str(i)) for i in range(40)))
    with BatchInput([source]) as lines:
        served, every = EndpointServer(server.url, concurrency=4), []

        def work() -> Iterator[int]:
            for some in served.answers(iter(lines)):
                every.extend(some)
                yield len(some)

        class Enough(Exception):
            pass

        def receive(number: int) -> None:
            if len(every) >= 8:
                raise Enough

        with pytest.raises(Enough):
            CallThread().run(work(), receive)  # type: ignore[arg-type]
    assert 8 <= len(every) < 40
    assert server.most_at_once == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"url": "localhost:8000"},
            "endpoint must be a URL such as http://127.0.0.1:8000 or grpc://127.0.0.1:50051, got 'local",
        ),
        ({"url": "http://a", "concurrency": 0}, "concurrency must be at least 1, got 0"),
    ],
)
def test_other_endpoints_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BatchFileError, match=message):
        EndpointServer(**options)
