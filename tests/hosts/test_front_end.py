"""What the front end hands on besides the messages."""

from __future__ import annotations

import asyncio

import grpc

from jaxserve.hosts.front_end import Proxy
from jaxserve.server.calls import Calls
from jaxserve.server.client import NO_PROXY
from jaxserve.server.config import ServerConfig
from jaxserve.server.keys import Keys
from jaxserve.server.listener import Listener

TRACEPARENT = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
KEY = ("authorization", "Bearer secret")
METHOD = "/jaxserve.v1.InferenceService/Generate"


class Leader(grpc.GenericRpcHandler):
    """Answers any call with nothing, and keeps the metadata."""

    def __init__(self) -> None:
        self.metadata: set[tuple[str, str | bytes]] = set()

    def service(self, handler_call_details):
        self.metadata = set(handler_call_details.invocation_metadata)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return b""


def test_the_callers_trace_and_key_go_on_behind_it() -> None:
    """What the leader's spans hang below, and by what its admission knows callers; nothing else."""

    async def call_through(leader: Leader) -> None:
        server = grpc.aio.server(handlers=(leader,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        proxy = Proxy(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[NO_PROXY]))
        proxy.unavailable = None
        listener = Listener(ServerConfig(port=0), Keys(None, {}), Calls())
        listener.server.add_generic_rpc_handlers((proxy,))
        await listener.start()
        async with grpc.aio.insecure_channel(listener.address, options=[NO_PROXY]) as channel:
            await channel.unary_unary(METHOD)(b"", metadata=[TRACEPARENT, KEY, ("x-other", "1")])
        await listener.stop()
        await server.stop(None)

    leader = Leader()
    asyncio.run(call_through(leader))
    assert leader.metadata >= {TRACEPARENT, KEY}
    assert "x-other" not in dict(leader.metadata)
