"""Where a server listens besides IPv4: IPv6, and Unix sockets with what is left of them."""

from __future__ import annotations

import http.client
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.client import Client
from tests.server.conftest import RunningServer


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


def status_of(connection: http.client.HTTPConnection) -> int:
    connection.request("GET", "/ready")
    status = connection.getresponse().status
    connection.close()
    return status


def serves(target: str) -> bool:
    with Client(target) as client:
        return len(list(client.generate("abc", max_tokens=2))) == 2


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6(make_server: Callable[..., RunningServer], host: str) -> None:
    server = make_server(host=host, http_port=0, metrics_port=0)
    assert server.target == f"[{host}]:{server.server.grpc.listener.port}"
    assert server.url == f"http://[{host}]:{server.server.http.port}"
    for name in ["[::1]", *(["127.0.0.1"] if host == "::" else [])]:
        assert serves(f"{name}:{server.server.grpc.listener.port}")
        assert status_of(http.client.HTTPConnection(f"{name}:{server.server.http.port}", timeout=20)) == 200


@pytest.mark.parametrize("name", ["http_port", "port"])
def test_ports_in_use_on_ipv6(make_server: Callable[..., RunningServer], name: str) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            make_server(host="::1", **{name: port})


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    return {"uds": str(tmp_path / "http"), "grpc_uds": str(tmp_path / "grpc")}


def test_unix_sockets(make_server: Callable[..., RunningServer], paths: dict[str, str]) -> None:
    server = make_server(**paths)
    assert server.target == f"unix:{paths['grpc_uds']}"
    assert server.url == "http+unix://" + paths["uds"].replace("/", "%2F")
    for _ in range(2):
        assert serves(server.target)
        assert status_of(UnixConnection(Path(paths["uds"]))) == 200
        for name, path in paths.items():
            with pytest.raises(ConfigError, match=re.escape(f"{name} {path!r} is in use")):
                make_server(**{name: path})
    server.call(server.server.shutdown())
    assert not any(Path(path).exists() for path in paths.values())


def test_sockets_of_servers_that_died_are_replaced(
    make_server: Callable[..., RunningServer], paths: dict[str, str]
) -> None:
    for path in paths.values():
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(path)
    server = make_server(**paths)
    assert serves(server.target)
    assert status_of(UnixConnection(Path(paths["uds"]))) == 200
    assert all(stat.S_ISSOCK(Path(path).stat().st_mode) for path in paths.values())


@pytest.mark.parametrize("name", ["uds", "grpc_uds"])
def test_paths_where_no_socket_can_be(make_server: Callable[..., RunningServer], tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path, message in (
        (file, f"{name} must be a socket or not be there, got the file {str(file)!r}"),
        (tmp_path / "no" / "socket", f"{name}: cannot listen on '{tmp_path}/no/socket': No such file or directory"),
        (tmp_path / ("a" * 108), f"{name}: cannot listen on '{tmp_path}/{'a' * 108}': AF_UNIX path too long"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make_server(**{name: str(path)})
    assert file.read_text() == "mine"
