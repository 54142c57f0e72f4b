"""The HTTP door's port: uvicorn in the event loop of the server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI

from jaxserve.server.config import ServerConfig
from jaxserve.server.http.protocol import IDLE_SECONDS, LimitedProtocol
from jaxserve.server.listener import listen_error, socket_address
from jaxserve.server.unix_socket import bind_unix

BACKLOG = 2048
FLUSH_SECONDS = 1


class HttpServer:
    """Serves ``app`` on a port or a Unix socket. Create it inside the event loop."""

    def __init__(self, config: ServerConfig, app: FastAPI) -> None:
        assert config.has_http
        self._host, self.port, self._path = config.host, config.http_port or 0, config.uds
        tls: dict[str, Any] = {}
        if config.ssl_certfile is not None and self._path is None:
            tls = {
                "ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile,
                "ssl_ca_certs": config.ssl_ca_certs,
                "ssl_cert_reqs": ssl.CERT_REQUIRED if config.ssl_ca_certs else ssl.CERT_NONE,
            }  # fmt: skip
        self._scheme = "https" if tls else "http"
        self._server = _Server(
            uvicorn.Config(
                app, http=LimitedProtocol, ws="none", lifespan="off", log_config=None, log_level="warning",
                access_log=False, server_header=False,
                timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=FLUSH_SECONDS, **tls,
            )
        )  # fmt: skip
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """A Unix socket's path stands for the host, escaped."""
        if self._path is not None:
            return f"http+unix://{quote(self._path, safe='')}"
        return f"{self._scheme}://{socket_address(self._host, self.port)}"

    async def start(self) -> None:
        """Raises ConfigError when the port or the path is taken."""
        if self._path is not None:
            listening = bind_unix("uds", self._path)
            listening.listen(BACKLOG)
        else:
            listening = self._bind_port()
            self.port = listening.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listening]))

    def _bind_port(self) -> socket.socket:
        is_v6 = ":" in self._host
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        try:
            # As for gRPC, :: is every address of either kind.
            return socket.create_server(
                (self._host, self.port), family=family, backlog=BACKLOG, dualstack_ipv6=is_v6
            )  # fmt: skip
        except OSError:
            raise listen_error(self._host, self.port) from None

    async def stop(self) -> None:
        """Give what was written a moment to reach its readers, and close the port."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        if self._path is not None:
            Path(self._path).unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
