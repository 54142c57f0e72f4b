"""The gRPC door: ``jaxserve.v1``, and what speaks other protocols beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from jaxserve.server import messages
from jaxserve.server.admission import Admission
from jaxserve.server.calls import Calls
from jaxserve.server.config import ServerConfig
from jaxserve.server.keys import Keys
from jaxserve.server.kserve import KSERVE_NAME, KServeServicer
from jaxserve.server.listener import SERVICE_NAME, Listener
from jaxserve.server.proto.inference import grpc_service_pb2_grpc as kserve_grpc
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.server.proto.vllm import vllm_engine_pb2_grpc as vllm_grpc
from jaxserve.server.servicer import InferenceServicer
from jaxserve.server.text_threads import TextThreads
from jaxserve.server.vllm_grpc import VLLM_NAME, VllmServicer


class GrpcServer:
    """What ``admission`` leads to, over gRPC, and its state as health. ``socket``: see Listener."""

    def __init__(
        self,
        config: ServerConfig,
        admission: Admission,
        texts: TextThreads,
        calls: Calls,
        keys: Keys,
        socket: Path | None = None,
    ) -> None:
        self._admission = admission
        self.listener = Listener(config, keys, calls, socket, services=(SERVICE_NAME, KSERVE_NAME, VLLM_NAME))
        server, max_message_bytes = self.listener.server, config.max_message_bytes
        pb_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(admission, texts, max_message_bytes), server)
        kserve_grpc.add_GRPCInferenceServiceServicer_to_server(
            KServeServicer(admission, texts, config.max_waiting, max_message_bytes), server
        )
        vllm_grpc.add_VllmEngineServicer_to_server(VllmServicer(admission, texts, max_message_bytes), server)
        self._last_words: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return self.listener.address

    async def start(self) -> None:
        """Listen; requests are UNAVAILABLE. Raises ConfigError when the port is taken."""
        await self.listener.start()

    async def set_ready(self) -> None:
        """Say that the engines, to which the admission is open, are there."""
        self.listener.door.max_request_bytes = messages.max_request_bytes(self._admission.replicas().model)
        self._last_words = asyncio.create_task(self._tell_failure())
        await self.listener.set_serving(True)

    async def _tell_failure(self) -> None:
        await self._admission.failed.wait()
        await self.listener.set_dead()

    async def set_draining(self) -> None:
        """Say that it ends; what is under way goes on."""
        await self.listener.set_serving(False)

    async def stop(self) -> None:
        """Give what was written a moment to reach its readers, and close the port."""
        if self._last_words is not None and not self._admission.failed.is_set():
            self._last_words.cancel()
        await self.listener.stop()
