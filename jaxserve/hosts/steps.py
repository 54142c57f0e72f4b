"""Steps for processes on several hosts: the leader, rank 0, plans, and every process runs the same programs on the same
arrays, which the leader streams to the others over gRPC.

A message is two int32, the kind and the size of a program, then its array as it lies in memory. gRPC's pings tell
within seconds of a process or a host that died or froze. Who takes part, and what others can read, says ``Trust``.
"""

from __future__ import annotations

import json
import logging
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import ResolvedConfig
from jaxserve.engine.runner import Kind, ModelRunner
from jaxserve.errors import ConfigError
from jaxserve.hosts.trust import Trust
from jaxserve.models.loading.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

SERVICE = "jaxserve.internal.Group"
HEADER = struct.Struct("<ii")
STOP = -1
"""A message's kind where it is not that of a program."""
PING_OPTIONS = [
    ("grpc.keepalive_time_ms", 4_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
    # A proxy in the environment is for the world outside.
    ("grpc.enable_http_proxy", 0),
]
STOP_TIMEOUT_SECONDS = 5.0
OWN_SETTINGS = ("trace", "compilation_cache")
"""Settings in which hosts may differ."""


class Followers:
    """The other processes of a group, as the leader sees them: it listens from the start and they join once ready.

    ``on_lost`` is called with a message when one that has joined goes away, from any thread; ``on_drain`` when one was
    told to end. ``address`` is a host and port, which must be free: ConfigError. Calls that ``trust`` does not admit
    are refused, and change nothing.
    """

    def __init__(
        self,
        num_followers: int,
        address: str,
        on_lost: Callable[[str], None],
        on_drain: Callable[[], None],
        trust: Trust,
    ) -> None:
        if trust.is_blind:
            logger.warning(
                "whoever reaches %s can read this group's steps, join and end it: give JAXSERVE_GROUP_SECRET, "
                "group_secret_file or group_certfile, or keep hosts on a network of their own",
                address,
            )
        self._num_followers = num_followers
        self._on_lost, self._on_drain = on_lost, on_drain
        self._queues: dict[int, queue.SimpleQueue[bytes]] = {}
        self._settings: dict[str, Any] = {}
        self._refused: str | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._server = grpc.server(
            ThreadPoolExecutor(num_followers + 1, thread_name_prefix="followers"),
            interceptors=[_Guard(trust)],
            options=[*PING_OPTIONS, ("grpc.so_reuseport", 0)],
        )
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Follow": grpc.unary_stream_rpc_method_handler(self._follow),
            "Drain": grpc.unary_unary_rpc_method_handler(self._drain),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self.port = trust.add_port(self._server, address)
        except RuntimeError:
            raise ConfigError(f"coordinator_port: cannot listen on {address}, the port above it") from None
        self._server.start()

    def wait(self, runner: ModelRunner) -> None:
        """Until all have joined. Raises ConfigError for one with other settings than the runner's."""
        with self._changed:
            self._settings = settings_of(runner)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._queues) == self._num_followers or self._refused)
        if self._refused:
            raise ConfigError(self._refused)

    def send(self, kind: int, size: int = 0, array: np.ndarray | None = None) -> None:
        message = HEADER.pack(kind, size) + (b"" if array is None else array.tobytes())
        for messages in list(self._queues.values()):
            messages.put(message)

    def stop(self) -> None:
        """Let the followers end, once they have done what was sent."""
        self._stopping = True
        self.send(STOP)
        with self._changed:
            self._changed.wait_for(lambda: not self._queues, STOP_TIMEOUT_SECONDS)
        self._server.stop(grace=None)

    def _follow(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        joining = json.loads(request)
        rank = joining["rank"]
        with self._changed:
            self._changed.wait_for(lambda: self._settings)
            difference = _difference(rank, joining["settings"], self._settings)
            if difference is None:
                messages = self._queues[rank] = queue.SimpleQueue()
            else:
                self._refused = difference
            self._changed.notify_all()
        if difference is not None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, difference)
        context.add_callback(lambda: self._leave(rank))
        while True:
            message = messages.get()
            yield message
            if HEADER.unpack_from(message)[0] == STOP:
                return

    def _leave(self, rank: int) -> None:
        if not self._stopping:
            self._on_lost(f"host {rank} of the group is gone")
        with self._changed:
            self._queues.pop(rank).put(HEADER.pack(STOP, 0))
            self._changed.notify_all()

    def _drain(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._on_drain()
        return b""


class _Guard(grpc.ServerInterceptor):
    """Refuses calls of processes that are not of the group."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if self._trust.admits(handler_call_details.invocation_metadata or ()):
            return continuation(handler_call_details)
        return grpc.unary_unary_rpc_method_handler(self._refuse)

    @staticmethod
    def _refuse(request: bytes, context: grpc.ServicerContext) -> NoReturn:
        logger.warning("a call from %s without the group's secret is refused", context.peer())
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "the group's secret must be the same on all hosts")


class Leader(ModelRunner):
    """Rank 0's runner: what it runs, the followers run too."""

    def __init__(
        self,
        followers: Followers,
        config: ResolvedConfig,
        checkpoint: Checkpoint,
        mesh: Mesh,
        *,
        show_progress: bool,
    ) -> None:
        super().__init__(config, checkpoint, mesh, show_progress=show_progress)
        self._followers = followers
        followers.wait(self)

    def run(self, kind: Kind, size: int, array: np.ndarray | None = None) -> Any:
        self._followers.send(kind, size, array)
        return super().run(kind, size, array)

    def close(self) -> None:
        self._followers.stop()
        super().close()


class Follower:
    """The leader, as another process of the group sees it. ``address``: where its ``Followers`` listen already.

    ``on_lost`` is called with a message, from any thread, when the leader goes away without a word.
    """

    def __init__(
        self, runner: ModelRunner, rank: int, address: str, on_lost: Callable[[str], None], trust: Trust
    ) -> None:
        self._runner, self._on_lost, self._metadata = runner, on_lost, trust.metadata
        self._channel = trust.channel(address, PING_OPTIONS)
        joining = json.dumps({"rank": rank, "settings": settings_of(runner)}).encode()
        follow: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(f"/{SERVICE}/Follow")
        self._call = follow(joining, metadata=self._metadata)
        self._messages: queue.SimpleQueue[bytes | ConfigError] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="leader", daemon=True).start()

    def run(self) -> None:
        """Run what the leader runs, until it stops. Raises ConfigError where this one has other settings."""
        self._runner.prepare_rare()
        while True:
            message = self._messages.get()
            if isinstance(message, ConfigError):
                raise message
            kind, size = HEADER.unpack_from(message)
            if kind == STOP:
                return
            array = np.frombuffer(message, np.int32, offset=HEADER.size)
            staged = kind == Kind.FORWARD
            self._runner.run(Kind(kind), size, array.reshape(self._runner.num_stages, -1) if staged else array)

    def drain(self) -> None:
        """Ask the leader to finish what runs and to stop the group."""
        drain: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/Drain")
        self._draining = drain.future(b"", metadata=self._metadata)  # a call that nobody holds is cancelled

    def _read(self) -> None:
        # A thread of its own, because the other one hangs in a collective once a process is gone.
        try:
            for message in self._call:
                self._messages.put(message)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
                self._messages.put(ConfigError(error.details()))
            else:
                self._on_lost(f"the leader of the group is gone: {error.details()}")


def settings_of(runner: ModelRunner) -> dict[str, Any]:
    """What must be the same in all processes of a group."""
    settings = {name: value for name, value in vars(runner.config).items() if name not in OWN_SETTINGS}
    return settings | {"num_blocks": runner.num_blocks, "jax": jax.__version__}


def _difference(rank: int, theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    for name, value in ours.items():
        if theirs.get(name) != value:
            return f"{name} must be the same on all hosts: the leader has {value!r}, host {rank} {theirs.get(name)!r}"
    return None
