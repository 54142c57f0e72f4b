"""TLS and mTLS on both ports, with certificates made here."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme

from jaxserve.errors import ConfigError
from jaxserve.server.client import Client
from tests.server.conftest import RunningServer


class Files:
    """An authority's, a server's and a client's certificates, as PEM files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority, self.server_key, self.server_cert, self.client = (
            folder / name for name in ("ca.pem", "server.key", "server.pem", "client.pem")
        )
        authority.cert_pem.write_to_path(self.authority)
        server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.org")
        server.private_key_pem.write_to_path(self.server_key)
        for blob in server.cert_chain_pems:
            blob.write_to_path(self.server_cert, append=True)
        client.private_key_and_cert_chain_pem.write_to_path(self.client)
        self.client_key = client.private_key_pem.bytes()
        self.client_chain = b"".join(blob.bytes() for blob in client.cert_chain_pems)

    @property
    def settings(self) -> dict[str, str]:
        return {"ssl_certfile": str(self.server_cert), "ssl_keyfile": str(self.server_key)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


def status_of(server: RunningServer, context: ssl.SSLContext) -> int:
    with urllib.request.urlopen(f"{server.url}/ready", context=context, timeout=20) as response:
        return response.status


def test_tls(make_server: Callable[..., RunningServer], files: Files) -> None:
    server = make_server(http_port=0, **files.settings)
    assert server.url.startswith("https://")
    assert status_of(server, ssl.create_default_context(cafile=files.authority)) == 200
    with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
        status_of(server, ssl.create_default_context())
    with Client(server.target, ca_file=str(files.authority)) as client:
        assert len(list(client.generate("abc", max_tokens=2))) == 2
    with Client(server.target) as client, pytest.raises(grpc.RpcError):
        client.model_info()


def test_clients_need_a_certificate_where_authorities_are_given(
    make_server: Callable[..., RunningServer], files: Files
) -> None:
    server = make_server(http_port=0, ssl_ca_certs=str(files.authority), **files.settings)
    context = ssl.create_default_context(cafile=files.authority)
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        status_of(server, context)
    context.load_cert_chain(files.client)
    assert status_of(server, context) == 200
    authority = files.authority.read_bytes()
    for credentials, served in (
        (grpc.ssl_channel_credentials(authority, files.client_key, files.client_chain), True),
        (grpc.ssl_channel_credentials(authority), False),
    ):
        with grpc.secure_channel(server.target, credentials) as channel:
            ready = grpc.channel_ready_future(channel)
            if served:
                ready.result(timeout=20)
            else:
                with pytest.raises(grpc.FutureTimeoutError):
                    ready.result(timeout=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ssl_certfile": __file__}, "ssl_certfile and ssl_keyfile must be given together, got "),
        ({"ssl_ca_certs": __file__}, "ssl_ca_certs needs ssl_certfile, got "),
        ({"ssl_certfile": "/no", "ssl_keyfile": __file__}, "ssl_certfile must be a file that can be read, got '/no'"),
        ({"api_key_file": "/no"}, "api_key_file '/no' cannot be read: No such file or directory"),
        ({"served_model_name": "a,,b"}, "served_model_name must be names apart by commas, got 'a,,b'"),
        ({"http_port": 70_000}, r"http_port must be in \[0, 65535\], got 70000"),
    ],
)
def test_wrong_settings(make_server: Callable[..., RunningServer], settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_server(**settings)


def test_files_that_are_no_certificates(make_server: Callable[..., RunningServer], files: Files) -> None:
    for http_port in (None, 0):
        with pytest.raises(ConfigError, match="ssl_certfile and ssl_keyfile must be a certificate and its key"):
            make_server(http_port=http_port, ssl_certfile=__file__, ssl_keyfile=str(files.server_key))


def test_a_key_for_grpc(make_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    server = make_server(api_key_file=str(file))
    with Client(server.target, api_key="secret") as client:
        assert len(list(client.generate("abc", max_tokens=2))) == 2
    for key in (None, "wrong"):
        with Client(server.target, api_key=key) as client:
            for call in (client.model_info, lambda client=client: list(client.generate("abc"))):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert client.ready(), "health needs no key"
