"""A server in this process: its doors, gRPC and HTTP, warm-up of the engines behind them, and drain."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, start_http_server

from jaxserve.config import EngineConfig
from jaxserve.server.admission import Admission
from jaxserve.server.calls import Calls
from jaxserve.server.config import ServerConfig
from jaxserve.server.grpc_server import GrpcServer
from jaxserve.server.keys import Keys
from jaxserve.server.listener import listen_error
from jaxserve.server.metrics import ServedMetrics, watch_admission
from jaxserve.server.signals import stop_signal
from jaxserve.server.spans import Spans
from jaxserve.server.text_threads import TextThreads

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine
    from jaxserve.server.http.server import HttpServer

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""After which a thread hands on Python's lock: every wait of the engine's for it makes a token late."""


class Server:
    """The doors of one process: gRPC, and HTTP where it has a port. Create it inside the event loop.

    ``socket``: see Listener; nobody but the front end calls there, with its callers' keys. Raises ConfigError
    where packages are missing, or a folder cannot be made.
    """

    def __init__(self, config: ServerConfig, socket: Path | None = None) -> None:
        self._spans = None if config.otlp_traces_endpoint is None else Spans(config.otlp_traces_endpoint)
        self.admission = Admission(config, self._spans)
        self._config = config
        self._registry = CollectorRegistry()
        watch_admission(self.admission, config.max_waiting, self._registry)
        self.keys = Keys(config.api_key_file)
        texts, calls = TextThreads(), Calls(self._registry)
        self.grpc = GrpcServer(config, self.admission, texts, calls, self.keys, socket)
        self.http: HttpServer | None = None
        if config.has_http:
            # Imported late: FastAPI takes half a second.
            from jaxserve.server.http.app import make_app
            from jaxserve.server.http.server import HttpServer

            app = make_app(config, self.admission, texts, self._registry, calls, self.keys)
            self.http = HttpServer(config, app)

    async def start(self) -> None:
        """Listen; whoever asks is told that the server warms up. Raises ConfigError when a port is taken."""
        await self.grpc.start()
        if self.http is not None:
            await self.http.start()
        if self._config.metrics_port is not None:
            start_metrics(self._config.host, self._config.metrics_port, self._registry)

    async def set_ready(self, engines: Sequence[Engine]) -> None:
        """Admit requests to warm engines of one model."""
        self.admission.open(engines)
        name = self.admission.replicas().model.names[0]
        self._registry.register(ServedMetrics([engine.metrics.registry for engine in engines], name))
        await self.grpc.set_ready()

    async def shutdown(self) -> None:
        """Say that it ends, drain, and stop."""
        await self.grpc.set_draining()
        await self.admission.drain()
        await self.grpc.stop()
        if self.http is not None:
            await self.http.stop()
        if self._spans is not None:
            await self._spans.close()


def start_metrics(host: str, port: int, registry: CollectorRegistry) -> None:
    """A Prometheus endpoint of its own. Raises ConfigError."""
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError:
        raise listen_error(host, port) from None


def build_engines(config: EngineConfig, num_engines: int = 1, **of_each: Any) -> list[Engine]:
    """Engines on devices of their own, with what else Engine takes ``of_each``. Raises ConfigError and ModelError."""
    # Imported late: jax takes seconds to load, and a port in use should be told before.
    started_seconds = time.monotonic()
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.memory import claim_gpu_memory
    from jaxserve.sharding.mesh import make_meshes

    make = partial(Engine, config, imports_seconds=time.monotonic() - started_seconds, **of_each)
    if num_engines == 1:
        return [make()]
    claim_gpu_memory(config.gpu_memory_utilization)
    meshes = make_meshes(num_engines, config.tensor_parallel, config.pipeline_parallel)
    return [make(mesh=mesh) for mesh in meshes]


def freeze_start_up() -> None:
    """Let no later garbage collection look through what start-up made, which stays: a full one stalls all requests."""
    gc.collect()
    gc.freeze()


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
    build: Callable[[], list[Engine]],
    socket: Path | None = None,
) -> int:
    """Serve what ``build`` makes until SIGTERM or SIGINT, then drain. Raises ConfigError and ModelError.

    Tells those who wait for it, unless it is behind a ``socket``, whose front end will. Returns the exit code: 1 when
    an engine failed, which can only be started again. When the signal comes during warm-up this returns at once, with
    the warm-up still running in its thread.
    """
    started_seconds = time.monotonic()
    sys.setswitchinterval(SWITCH_SECONDS)
    stopped = stop_signal(of_terminal=socket is None)
    server = Server(server_config, socket)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.keys.reload)
    await server.start()
    try:
        warm_up = asyncio.create_task(in_daemon_thread(build))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait((warm_up, stopping), return_when=asyncio.FIRST_COMPLETED)
        if warm_up.done():
            engines = warm_up.result()
            freeze_start_up()
            await server.set_ready(engines)
            if server.http is not None:
                print(f"jaxserve: OpenAI's API at {server.http.address}/v1, a page at {server.http.address}/")
            if socket is None:
                announce(engine_config, server.grpc.address, started_seconds)
            failing = asyncio.create_task(server.admission.failed.wait())
            await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        logger.info("stopping: requests in flight have %g s to finish", server_config.drain_seconds)
    finally:
        await server.shutdown()
    return int(server.admission.failed.is_set())


def announce(config: EngineConfig, address: str, started_seconds: float) -> None:
    """The line that programs which start a server wait for."""
    elapsed_seconds = time.monotonic() - started_seconds
    print(f"jaxserve: SERVING model={config.model} on {address} after {elapsed_seconds:.1f} s", flush=True)
