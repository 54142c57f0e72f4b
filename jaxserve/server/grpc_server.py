"""The gRPC server of the engines in this process: metrics endpoint, warm-up and drain."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, start_http_server

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.server import messages
from jaxserve.server.admission import Admission
from jaxserve.server.listener import Listener, listen_error
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.server.replicas import ReplicaMetrics
from jaxserve.server.servicer import InferenceServicer
from jaxserve.server.signals import stop_signal
from jaxserve.server.text_threads import TextThreads

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""After which a thread hands on Python's lock: every wait of the engine's for it makes a token late."""


def start_metrics(host: str, port: int) -> CollectorRegistry:
    """A Prometheus endpoint over the registry returned, empty at first. Raises ConfigError."""
    registry = CollectorRegistry()
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError:
        raise listen_error(host, port) from None
    return registry


class GrpcServer:
    """What ``admission`` leads to, over gRPC, and its state as health. ``socket``: see Listener."""

    def __init__(self, config: ServerConfig, admission: Admission, socket: Path | None = None) -> None:
        self._admission = admission
        self._servicer = InferenceServicer(admission, TextThreads(), config.max_message_bytes)
        self.listener = Listener(config, socket)
        self._last_words: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; everything but health and reflection is UNAVAILABLE. Raises ConfigError when the port is taken."""
        pb_grpc.add_InferenceServiceServicer_to_server(self._servicer, self.listener.server)
        await self.listener.start()

    async def set_ready(self) -> None:
        """Say that the engines, to which the admission is open, are there."""
        self.listener.door.max_request_bytes = messages.max_request_bytes(self._admission.replicas().model)
        self._last_words = asyncio.create_task(self._tell_failure())
        await self.listener.set_serving(True)

    async def _tell_failure(self) -> None:
        await self._admission.failed.wait()
        await self.listener.set_dead()

    async def shutdown(self) -> None:
        """Say that it ends, drain, and stop."""
        await self.listener.set_serving(False)
        await self._admission.drain()
        if self._last_words is not None and not self._admission.failed.is_set():
            self._last_words.cancel()
        await self.listener.stop()


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
    admission = Admission(server_config)
    server = GrpcServer(server_config, admission, socket)
    await server.start()
    try:
        registry = None
        if server_config.metrics_port is not None:
            registry = start_metrics(server_config.host, server_config.metrics_port)
        warm_up = asyncio.create_task(in_daemon_thread(build))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait((warm_up, stopping), return_when=asyncio.FIRST_COMPLETED)
        if warm_up.done():
            engines = warm_up.result()
            freeze_start_up()
            if registry is not None:
                registries = [engine.metrics.registry for engine in engines]
                registry.register(registries[0] if len(engines) == 1 else ReplicaMetrics(registries))
            admission.open(engines)
            await server.set_ready()
            if socket is None:
                announce(engine_config, server.listener.address, started_seconds)
            failing = asyncio.create_task(admission.failed.wait())
            await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        logger.info("stopping: requests in flight have %g s to finish", server_config.drain_seconds)
    finally:
        await server.shutdown()
    return int(admission.failed.is_set())


def announce(config: EngineConfig, address: str, started_seconds: float) -> None:
    """The line that programs which start a server wait for."""
    elapsed_seconds = time.monotonic() - started_seconds
    print(f"jaxserve: SERVING model={config.model} on {address} after {elapsed_seconds:.1f} s", flush=True)
