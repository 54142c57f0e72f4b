"""The gRPC front end of one engine: its port, health and reflection, metrics endpoint, warm-up and drain."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from jaxserve.config import ConfigError, EngineConfig, ServerConfig
from jaxserve.server.engine_thread import EngineThread
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.server.servicer import ErrorInterceptor, InferenceServicer

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
LIVE = ""
"""The health service's name for the whole server."""
SPARE_RPCS = 128
"""Room for health checks, aborts and tokenization besides the requests that max_waiting admits."""
FLUSH_SECONDS = 1.0
DRAIN_POLL_SECONDS = 0.02

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Message limits and keepalive of the server."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
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


def start_metrics(host: str, port: int) -> CollectorRegistry:
    """A Prometheus endpoint over the registry returned, empty at first. Raises ConfigError."""
    registry = CollectorRegistry()
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError:
        raise listen_error(host, port) from None
    return registry


class GrpcServer:
    """The port and the state behind it: warming up, then serving, then draining.

    Health: the server as a whole is live from the start until the engine fails; ``SERVICE_NAME`` is SERVING between
    warm-up and drain.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._servicer = InferenceServicer(config.max_waiting)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=channel_options(config.max_message_bytes),
            maximum_concurrent_rpcs=config.max_waiting + SPARE_RPCS,
        )
        self._last_words: asyncio.Task[None] | None = None
        self.port = config.port

    async def start(self) -> None:
        """Listen; everything but health and reflection is UNAVAILABLE. Raises ConfigError when the port is taken."""
        pb_grpc.add_InferenceServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._health.set(SERVICE_NAME, NOT_SERVING)
        try:
            self.port = self._server.add_insecure_port(socket_address(self._config.host, self._config.port))
        except RuntimeError:
            raise listen_error(self._config.host, self._config.port) from None
        await self._server.start()

    async def set_ready(self, engine: Engine) -> None:
        """Serve a warm engine, which from now on belongs to this server."""
        self._servicer.engine_thread = EngineThread(engine, self._on_engine_death)
        await self._health.set(SERVICE_NAME, SERVING)

    def _on_engine_death(self) -> None:
        self._last_words = asyncio.create_task(self._set_not_live())

    async def _set_not_live(self) -> None:
        await self._health.set(SERVICE_NAME, NOT_SERVING)
        await self._health.set(LIVE, NOT_SERVING)

    async def shutdown(self) -> None:
        """Refuse new requests, give the running ones drain_seconds to finish, abort the others, and stop."""
        await self._health.set(SERVICE_NAME, NOT_SERVING)
        self._servicer.draining = True
        deadline_seconds = time.monotonic() + self._config.drain_seconds
        while self._servicer.num_active and time.monotonic() < deadline_seconds:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        if self._servicer.engine_thread is not None:
            await self._servicer.engine_thread.stop()
            self._servicer.engine_thread.engine.close()
        await self._server.stop(FLUSH_SECONDS)


def build_engine(config: EngineConfig) -> Engine:
    # Imported late: jax takes seconds to load, and a port in use should be told before.
    from jaxserve.engine.engine import Engine

    return Engine(config)


async def in_daemon_thread[Result](function: Callable[..., Result], *args: Any) -> Result:
    """``asyncio.to_thread``, except that the end of the event loop does not wait for the thread."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="engine-warm-up", daemon=True).start()
    return await asyncio.wrap_future(future)


async def serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    build_engine: Callable[[EngineConfig], Engine] = build_engine,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises ConfigError and ModelError.

    When the signal comes during warm-up this returns at once, with the warm-up still running in its thread.
    """
    started_seconds = time.monotonic()
    stopped = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stopped.set)

    server = GrpcServer(server_config)
    await server.start()
    try:
        registry = None
        if server_config.metrics_port is not None:
            registry = start_metrics(server_config.host, server_config.metrics_port)
        warm_up = asyncio.create_task(in_daemon_thread(build_engine, engine_config))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait((warm_up, stopping), return_when=asyncio.FIRST_COMPLETED)
        if warm_up.done():
            engine = warm_up.result()
            if registry is not None:
                registry.register(engine.metrics.registry)
            await server.set_ready(engine)
            address = socket_address(server_config.host, server.port)
            elapsed_seconds = time.monotonic() - started_seconds
            print(
                f"jaxserve: SERVING model={engine_config.model} on {address} after {elapsed_seconds:.1f} s", flush=True
            )
            await stopped.wait()
        logger.info("stopping: requests in flight have %g s to finish", server_config.drain_seconds)
    finally:
        await server.shutdown()
