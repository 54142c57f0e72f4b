"""What every front end has: a gRPC port, health and reflection."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.errors import ConfigError
from jaxserve.server.calls import Calls
from jaxserve.server.config import ServerConfig
from jaxserve.server.door import Door
from jaxserve.server.keys import Keys
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.unix_socket import bind_unix

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
LIVE = ""
"""The health service's name for the whole server."""
SPARE_CALLS = 128
"""Room for aborts and tokenization besides the requests that max_waiting admits."""
FLUSH_SECONDS = 1.0
MAX_INT32 = 2**31 - 1

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Listener:
    """A port or a Unix socket. The server as a whole is live from the start until ``set_dead``; its ``services`` are
    SERVING between ``set_serving(True)`` and ``set_serving(False)``. Create it inside the event loop.

    Handlers of the services themselves are added to ``server`` before the start. ``socket``: the path of a Unix socket,
    to listen on instead of what the configuration says, without TLS.
    """

    def __init__(
        self,
        config: ServerConfig,
        keys: Keys,
        calls: Calls,
        socket: Path | None = None,
        services: Sequence[str] = (SERVICE_NAME,),
    ) -> None:
        self._services = services
        self._config = config
        self._path = config.grpc_uds if socket is None else str(socket)
        self._health = health.aio.HealthServicer()
        self.door = Door(keys, calls, config.max_waiting + SPARE_CALLS, config.max_message_bytes)
        self.server = grpc.aio.server(interceptors=[self.door], options=channel_options(config.max_message_bytes))
        self.port = config.port

    @property
    def address(self) -> str:
        return f"unix:{self._path}" if self._path else socket_address(self._config.host, self.port)

    async def start(self) -> None:
        """Raises ConfigError when the port or the path is taken."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection(
            (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server
        )
        await self.set_serving(False)
        if self._path is not None:
            bind_unix("grpc_uds", self._path).close()  # gRPC replaces any file, and removes its own at the end
        try:
            if self._config.ssl_certfile is None or self._path is not None:
                port = self.server.add_insecure_port(self.address)
            else:
                port = self.server.add_secure_port(self.address, self._credentials())
        except RuntimeError:
            raise listen_error(self._config.host, self._config.port) from None
        self.port = port
        await self.server.start()

    def _credentials(self) -> grpc.ServerCredentials:
        config = self._config
        assert config.ssl_certfile is not None
        assert config.ssl_keyfile is not None
        return server_credentials(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs, settings="ssl")

    async def set_serving(self, serving: bool) -> None:
        for name in self._services:
            await self._health.set(name, SERVING if serving else NOT_SERVING)

    async def set_dead(self) -> None:
        await self.set_serving(False)
        await self._health.set(LIVE, NOT_SERVING)

    async def stop(self) -> None:
        """Give what was written a moment to reach its readers, and close the port."""
        await self.server.stop(FLUSH_SECONDS)


def server_credentials(certfile: str, keyfile: str, ca_certs: str | None, *, settings: str) -> grpc.ServerCredentials:
    """Of PEM files; with ``ca_certs`` clients need a certificate. Raises ConfigError for what is in them, which calls
    them ``settings`` _certfile and _keyfile.
    """
    pair = Path(keyfile).read_bytes(), Path(certfile).read_bytes()
    authorities = None if ca_certs is None else Path(ca_certs).read_bytes()
    try:
        ssl.create_default_context().load_cert_chain(certfile, keyfile)
    except ssl.SSLError as error:  # gRPC itself would log it, and listen all the same
        raise ConfigError(
            f"{settings}_certfile and {settings}_keyfile must be a certificate and its key (PEM), got {certfile!r} and "
            f"{keyfile!r}: {error}"
        ) from None
    return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)


def message_limits(max_message_bytes: int) -> list[tuple[str, int]]:
    """Of either end of a channel."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Message limits and keepalive of the server."""
    return [
        *message_limits(max_message_bytes),
        # Calls that nobody has looked at yet: gRPC would cancel some of a thousand at random, and those that wait for
        # long, while ours are refused one by one, with a status that says why.
        ("grpc.server.max_pending_requests", MAX_INT32),
        ("grpc.server.max_pending_requests_hard_limit", MAX_INT32),
        ("grpc.server_max_unrequested_time_in_server", MAX_INT32),
        # Without this a second server on the same port silently takes half of the connections.
        ("grpc.so_reuseport", 0),
        # Gateways ping idle connections; gRPC's own limits answer that with GOAWAY too_many_pings.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that vanished without closing its connection gives back its blocks after this long.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def socket_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_error(host: str, port: int) -> ConfigError:
    """Why nothing can listen there; gRPC itself does not say."""
    reason = "the address was refused"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return ConfigError(f"port {port} is in use")
        reason = error.strerror or str(error)
    return ConfigError(f"cannot listen on {socket_address(host, port)}: {reason}")
