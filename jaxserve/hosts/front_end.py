"""The front end of a model on several hosts: a process of its own, because those that share a model die together.

It hands every call on to the leader's process, which serves on a Unix socket, and watches over that process.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.config import EngineConfig
from jaxserve.hosts.group import Group
from jaxserve.hosts.ranks import LOST, run_leader
from jaxserve.server import serve
from jaxserve.server.calls import Calls
from jaxserve.server.client import NO_PROXY
from jaxserve.server.config import ServerConfig
from jaxserve.server.door import Context, StatusError
from jaxserve.server.keys import Keys
from jaxserve.server.listener import SERVICE_NAME, SERVING, Listener, message_limits
from jaxserve.server.signals import stop_signal
from jaxserve.server.spans import TRACE_HEADERS

FORWARDED = ("authorization", *TRACE_HEADERS)
"""Metadata for the leader: who calls, as admission, which is there, has a limit for each, and what spans hang below."""


class Proxy(grpc.GenericRpcHandler):
    """Hands the service's calls on, message by message and unread."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.unavailable: str | None = "the server is warming up"
        """Why no call is taken."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if not method.startswith(f"/{SERVICE_NAME}/"):
            return None
        # On the wire a call with one response is a stream of one.
        return grpc.unary_stream_rpc_method_handler(functools.partial(self._forward, method))

    async def _forward(self, method: str, request: bytes, context: Context) -> None:
        if self.unavailable is not None:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, self.unavailable)
        forward: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(method)
        metadata = [(name, value) for name, value in context.invocation_metadata() or () if name in FORWARDED]
        call = forward(request, timeout=context.time_remaining(), metadata=metadata)
        try:
            async for response in call:
                await context.write(response)
        except grpc.aio.AioRpcError as error:
            gone = self._channel.get_state() is not grpc.ChannelConnectivity.READY
            message = "the engine has stopped" if gone else error.details() or ""
            raise StatusError(error.code(), message, tuple(error.trailing_metadata())) from None  # type: ignore[arg-type]
        finally:
            call.cancel()


class FrontEnd:
    """The port, and behind it the process of rank 0. Create it inside the event loop."""

    def __init__(self, engine_config: EngineConfig, server_config: ServerConfig, group: Group, folder: Path) -> None:
        self._config = engine_config
        socket = folder / "engine"
        options = [*message_limits(server_config.max_message_bytes), NO_PROXY]
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=options)
        self._proxy = Proxy(self._channel)
        self._keys = Keys(server_config.api_key_file)
        self._listener = Listener(server_config, self._keys, Calls())
        self._listener.server.add_generic_rpc_handlers((self._proxy,))
        # A fork would inherit gRPC's threads, or their locks.
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_leader, args=(engine_config, server_config, group, socket), name="leader"
        )

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, or until the group ends; returns the exit code. Raises ConfigError."""
        started_seconds = time.monotonic()
        stopped = stop_signal()
        await self._listener.start()
        # A terminal sends SIGINT to both processes. The other one ignores it from birth: this one tells it. So with
        # SIGHUP until it has a handler.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
        self._process.start()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_keys)
        following = asyncio.create_task(self._follow_health(started_seconds))
        ended = asyncio.create_task(serve.in_daemon_thread(self._process.join))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
        following.cancel()
        if stopped.is_set():
            await self._listener.set_serving(False)
            self._process.terminate()  # it drains, and ends the group
            await ended
        self._proxy.unavailable = "the engine has stopped"
        await self._listener.set_dead()
        await self._listener.stop()
        await self._channel.close()
        exit_code = self._process.exitcode
        if exit_code == -signal.SIGTERM and stopped.is_set():  # before it could handle signals
            return 0
        return exit_code if exit_code is not None and exit_code >= 0 else LOST

    def _reload_keys(self) -> None:
        self._keys.reload()
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGHUP)  # it has the HTTP door

    async def _follow_health(self, started_seconds: float) -> None:
        """Be what the leader's process is: warming up, serving, draining."""
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        async for response in health_pb2_grpc.HealthStub(self._channel).Watch(request, wait_for_ready=True):
            serving = response.status == SERVING
            await self._listener.set_serving(serving)
            if serving:
                self._proxy.unavailable = None
                serve.announce(self._config, self._listener.address, started_seconds)
