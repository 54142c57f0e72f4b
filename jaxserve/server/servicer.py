"""The methods of ``jaxserve.v1.InferenceService``, and the one place where errors become gRPC statuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from jaxserve.request import RequestError
from jaxserve.server import messages
from jaxserve.server.engine_thread import EngineDeadError
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.server.replicas import Replicas

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARACTERS = 128
MAX_STATUS_CHARACTERS = 1000
"""A status travels in the trailing headers, which have a limit; a message may quote what the caller sent."""
TOKENIZE_TIMEOUT_SECONDS = 30.0
RETRY_AFTER_MS = 1000

Context = grpc.aio.ServicerContext[Any, Any]
Handler = Callable[[Any, Context], Awaitable[Any]]


class StatusError(Exception):
    """An RPC's failure as the client sees it."""

    def __init__(
        self, code: grpc.StatusCode, message: str, trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message[:MAX_STATUS_CHARACTERS]
        self.trailing_metadata = trailing_metadata


def status_of(error: Exception) -> StatusError:
    """What the client may know of an exception: everything of our own errors, nothing of any other."""
    match error:
        case StatusError():
            return error
        case RequestError():
            return StatusError(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        case EngineDeadError():
            return StatusError(grpc.StatusCode.UNAVAILABLE, str(error))
    logger.error("uncaught exception in an RPC", exc_info=error)
    return StatusError(grpc.StatusCode.INTERNAL, "internal error")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions into statuses; without it gRPC sends the text of any exception to the client."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:  # an unknown method; reflection
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    @staticmethod
    def _guarded(handler: Handler) -> Handler:
        async def guarded(request: Any, context: Context) -> Any:
            try:
                return await handler(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                status = status_of(error)
                await context.abort(status.code, status.message, status.trailing_metadata)

        return guarded


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Serves the model that ``replicas`` run; UNAVAILABLE while there are none."""

    def __init__(self, max_waiting: int) -> None:
        self.replicas: Replicas | None = None
        self.draining = False
        self.num_active = 0
        """Calls of Generate under way, those that still tokenize included."""
        self._max_waiting = max_waiting

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        replicas = self._started(request.model)
        if self.draining:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the server is draining")
        if self.num_active >= self._max_waiting:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"max_waiting requests are in flight, the limit is {self._max_waiting}",
                (("retry-after-ms", str(RETRY_AFTER_MS)),),
            )
        self.num_active += 1
        try:
            await self._generate(replicas, request, context)
        finally:
            self.num_active -= 1

    async def _generate(self, replicas: Replicas, request: pb.GenerateRequest, context: Context) -> None:
        request_id = request.request_id or uuid.uuid4().hex
        if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
            raise RequestError(
                f"request_id must have at most {MAX_REQUEST_ID_CHARACTERS} characters, got {len(request_id)}"
            )
        engine = replicas.engine
        token_ids = await self._off_loop(messages.prompt_token_ids, request, engine)
        params = messages.sampling_params(request.sampling_params, engine, len(token_ids))
        num_output_tokens = 0
        # A call that is cancelled or past its deadline raises CancelledError here, and closing the iterator aborts
        # the request in the engine.
        async with contextlib.aclosing(replicas.generate(request_id, token_ids, params)) as deltas:
            async for delta in deltas:
                num_output_tokens += len(delta.token_ids)
                await context.write(messages.generate_response(delta, num_output_tokens))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=await self._started().abort(request.request_id))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return messages.model_info(self._started().engine)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        engine = self._started(request.model).engine
        return pb.TokenizeResponse(token_ids=await self._off_loop(messages.prompt_token_ids, request, engine))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        engine = self._started(request.model).engine
        return pb.DetokenizeResponse(text=await self._off_loop(messages.text_of, request, engine))

    def _started(self, model: str = "") -> Replicas:
        """The replicas, once they are there, when the caller wants their model or names none."""
        if self.replicas is None:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the server is warming up")
        served = self.replicas.engine.config.model
        if model and model != served:
            raise StatusError(
                grpc.StatusCode.NOT_FOUND, f"model must be {served!r}, which is served here, got {model!r}"
            )
        return self.replicas

    @staticmethod
    async def _off_loop[Message, Result](
        function: Callable[[Message, Engine], Result], request: Message, engine: Engine
    ) -> Result:
        """Tokenizers and templates may take long: in a thread, with a limit, so that streams flow on meanwhile."""
        try:
            async with asyncio.timeout(TOKENIZE_TIMEOUT_SECONDS):
                return await asyncio.to_thread(function, request, engine)
        except TimeoutError:
            raise RequestError(f"prompt must tokenize within {TOKENIZE_TIMEOUT_SECONDS:g} s, got no result") from None
