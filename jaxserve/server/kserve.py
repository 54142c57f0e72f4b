"""The methods of ``inference.GRPCInferenceService``, KServe's and Triton's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.metadata import version

import grpc

from jaxserve.errors import RequestError
from jaxserve.request import FinishReason
from jaxserve.served_model import ServedModel, UnknownModelError
from jaxserve.server import kserve_messages as messages
from jaxserve.server.admission import Admission
from jaxserve.server.door import Context, OpenMessage, check_response_size, status_of
from jaxserve.server.errors import AbortedError
from jaxserve.server.proto.inference import grpc_service_pb2 as pb
from jaxserve.server.proto.inference import grpc_service_pb2_grpc as pb_grpc
from jaxserve.server.text_threads import TextThreads

KSERVE_NAME = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
EXTENSIONS = ("model_configuration",)

Write = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


class KServeServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Translates between messages and the engines that ``admission`` leads to.

    ``max_waiting``: requests of one stream that are under way before the next is read.
    """

    def __init__(self, admission: Admission, texts: TextThreads, max_waiting: int, max_message_bytes: int) -> None:
        self._admission, self._texts = admission, texts
        self._max_waiting, self._max_message_bytes = max_waiting, max_message_bytes

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=not self._admission.failed.is_set())

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._admission.is_ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        try:
            ready = self._admission.is_ready and self._model(request.name, request.version) is not None
        except UnknownModelError:
            ready = False
        return pb.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="jaxserve", version=version("jaxserve"), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        return messages.metadata(self._model(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        return messages.config(self._model(request.name, request.version))

    def _model(self, name: str, model_version: str) -> ServedModel:
        """Raises UnavailableError during warm-up, and UnknownModelError."""
        messages.check_version(model_version)
        return self._admission.replicas(name).model

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        async with contextlib.aclosing(self._responses(request, streams=False)) as responses:
            return await anext(responses)

    async def ModelStreamInfer(self, requests: AsyncIterator[OpenMessage], context: Context) -> None:
        writing, room = asyncio.Lock(), asyncio.Semaphore(self._max_waiting)

        async def write(response: pb.ModelStreamInferResponse) -> None:
            # Who has gone needs no answer: the call is about to be cancelled.
            with contextlib.suppress(grpc.aio.BaseError):
                async with writing:
                    await context.write(response)

        # A call that is cancelled or past its deadline raises CancelledError here, which ends all its tasks.
        async with asyncio.TaskGroup() as group:
            async for open_request in requests:
                await room.acquire()
                task = group.create_task(self._stream(open_request, write))
                task.add_done_callback(lambda _: room.release())

    async def _stream(self, open_request: OpenMessage, write: Write) -> None:
        """Answer one request of a stream, which fails alone."""
        request = pb.ModelInferRequest()
        try:
            with open_request() as request:
                async with contextlib.aclosing(self._responses(request, streams=True)) as responses:
                    async for response in responses:
                        whole = pb.ModelStreamInferResponse(infer_response=response)
                        check_response_size(whole.ByteSize(), self._max_message_bytes)
                        await write(whole)
        except Exception as error:
            await write(messages.failure(request, status_of(error).message))

    async def _responses(self, request: pb.ModelInferRequest, streams: bool) -> AsyncGenerator[pb.ModelInferResponse]:
        """One for every delta where the request asks for a stream, else one with all of them. Closing it aborts.

        ``streams``: whether there may be several.
        """
        with self._admission.request(request.model_name) as replicas:
            ask = messages.parse(request)
            if ask.stream and not streams:
                raise RequestError("stream must be false in ModelInfer, got true: ModelStreamInfer has streams")
            # Tokenizers may take long: not in the event loop, and with a limit.
            prepare = partial(ask.prepare, replicas.model)
            token_ids, params = await self._texts.run(prepare, request.ByteSize())
            reply = messages.Reply(request.id, replicas.model.names[0])
            text, empty_final = ask.echoed, ask.empty_final and streams
            async with contextlib.aclosing(replicas.generate(uuid.uuid4().hex, token_ids, params)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is FinishReason.ABORT:
                        raise AbortedError()
                    text += delta.text
                    ends = delta.finish_reason is not None
                    if ask.stream or ends:
                        yield reply.output(text, is_final=ends and not empty_final)
                        text = ""
            if empty_final:
                yield reply.end()
