"""What comes before a request is one: heads that are too large or too slow, and connections that send nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from jaxserve.server.http import exchange, protocol
from jaxserve.server.http.protocol import MAX_HEAD_BYTES
from tests.server.conftest import RunningServer

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = json.dumps({"prompt": "abc"}).encode()
POST = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.fixture
def server(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server(http_port=0)


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Callable[[], socket.socket]]:
    made = []

    def connect() -> socket.socket:
        made.append(socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


def head_of(num_bytes: int) -> bytes:
    """A GET with a header that makes it as long as this."""
    return GET + b"X: " + b"a" * (num_bytes - len(GET) - 7) + b"\r\n\r\n"


def answers(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def check_refusal(received: bytes, status: bytes, message: str) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status)
    assert b"\r\nconnection: close" in head
    assert b"\r\ncontent-type: application/json" in head
    assert b"\r\ncontent-length: %d\r\n" % len(body) in head
    assert json.loads(body)["error"] == {
        "message": message, "type": "invalid_request_error", "param": None, "code": None,
    }  # fmt: skip


def drip(connection: socket.socket, drop: bytes, pause_seconds: float = 0.005) -> None:
    for _ in range(10_000):
        connection.sendall(drop)
        time.sleep(pause_seconds)


LARGE = "request line and headers must have at most 65536 bytes together, got more"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "head",
    [
        head_of(MAX_HEAD_BYTES + 1),
        head_of(1 << 20),
        GET + b"X: 1\r\n" * 20_000,
        b"GET /" + b"a" * (1 << 17),
        GET + b"X" * (1 << 17),
    ],
    ids=["one byte more", "a long value", "many headers", "a path without end", "a name without end"],
)
def test_heads_that_are_too_large(connect: Callable[[], socket.socket], head: bytes) -> None:
    connection = connect()
    connection.sendall(head)
    check_refusal(answers(connection), b"431 ", LARGE)


def test_the_largest_head_and_many_small_ones_are_served(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    for requests in (head_of(MAX_HEAD_BYTES), (GET + b"\r\n") * 3000, POST * 1000):
        connection.sendall(requests)
        num_left = requests.count(b"HTTP/1.1")
        while num_left:
            received = connection.recv(1 << 16)
            assert received
            num_left -= received.count(b"HTTP/1.1 200 OK")


def test_a_body_is_no_head(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    padded = b'{"prompt": "abc"' + b" " * (4 * MAX_HEAD_BYTES) + b"}"
    connection.sendall(CHUNKED)
    for start in range(0, len(padded), 1000):
        chunk = padded[start : start + 1000]
        connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    connection.sendall(b"0\r\n\r\n")
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_trailers_have_the_limit_too(server: RunningServer, connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(CHUNKED + b"1\r\n{\r\n0\r\n")
    with pytest.raises(ConnectionError):
        drip(connection, b"X: " + b"a" * 1000 + b"\r\n", pause_seconds=0)
    answer = connect()
    answer.sendall(POST)
    assert answer.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def hasty(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """For heads, not for what keeps connections between requests."""
    monkeypatch.setattr(protocol, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.2)


@pytest.mark.usefixtures("hasty")
def test_heads_that_are_too_slow(connect: Callable[[], socket.socket]) -> None:
    silent, used = connect(), connect()
    used.sendall(GET + b"\r\n")
    assert used.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    time.sleep(0.5)  # longer than a head may take: between requests there is none
    used.sendall(GET[:20])
    check_refusal(answers(used), b"408 ", "request line and headers must come within 65 s")
    assert answers(silent) == b"", "who sends nothing gets nothing"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("start", "drop"), [(b"", b"\r\n"), (GET + b"X: ", b"a")])
def test_a_drip_ends(connect: Callable[[], socket.socket], start: bytes, drop: bytes) -> None:
    connection = connect()
    connection.sendall(start)
    with pytest.raises(ConnectionError):
        drip(connection, drop)


@pytest.mark.usefixtures("hasty")
def test_a_head_that_begins_during_a_response_waits_for_its_end(
    server: RunningServer, connect: Callable[[], socket.socket], eventually: Callable[..., None]
) -> None:
    connection = connect()
    body = json.dumps({"prompt": "a", "max_tokens": 100}).encode()  # half a second
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)
    eventually(lambda: server.engine.running)
    connection.sendall(GET[:20])
    served, late = answers(connection).split(b"HTTP/1.1 ")[1:]
    assert served.startswith(b"200 ")
    assert b"x" * 100 in served
    assert late.startswith(b"408 ")


def test_a_body_that_is_too_slow_leaves_the_queue(
    server: RunningServer, connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.2)
    connection = connect()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    check_refusal(answers(connection), b"408 ", "body must come within 0.2 s")
    assert not server.admission.num_active
