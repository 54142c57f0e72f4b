"""The methods of ``jaxserve.v1.InferenceService``."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import Message

from jaxserve.errors import RequestError
from jaxserve.server import messages
from jaxserve.server.door import Context, StatusError, overloaded
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.server.replicas import Replicas
from jaxserve.server.text_threads import TextThreads

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

MAX_REQUEST_ID_CHARACTERS = 128
TOKENIZE_TIMEOUT_SECONDS = 30.0


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Serves the model that ``replicas`` run; UNAVAILABLE while there are none."""

    def __init__(self, max_waiting: int, max_message_bytes: int) -> None:
        self.replicas: Replicas | None = None
        self.draining = False
        self.num_active = 0
        """Calls of Generate under way, those that still tokenize included."""
        self._max_waiting, self._max_message_bytes = max_waiting, max_message_bytes
        self._texts = TextThreads()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        replicas = self._started(request.model)
        if self.draining:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the server is draining")
        if self.num_active >= self._max_waiting:
            raise overloaded(f"max_waiting requests are in flight, the limit is {self._max_waiting}")
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
        token_ids = await self._prompt_token_ids(request, engine)
        params = messages.sampling_params(request.sampling_params, engine, len(token_ids))
        room = messages.ResponseRoom(request_id, params, self._max_message_bytes)
        num_output_tokens = 0
        # A call that is cancelled or past its deadline raises CancelledError here, and closing the iterator aborts
        # the request in the engine.
        async with contextlib.aclosing(replicas.generate(request_id, token_ids, params)) as deltas:
            async for delta in deltas:
                num_output_tokens += len(delta.token_ids)
                for response in messages.generate_responses(delta, num_output_tokens, room):
                    await context.write(response)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=await self._started().abort(request.request_id))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return messages.model_info(self._started().engine)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        engine = self._started(request.model).engine
        return pb.TokenizeResponse(token_ids=await self._prompt_token_ids(request, engine))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        engine = self._started(request.model).engine
        messages.check_size(request, engine)
        text = await self._in_thread(messages.text_of, request, engine)
        return pb.DetokenizeResponse(text=text)

    async def _prompt_token_ids(self, request: pb.GenerateRequest | pb.TokenizeRequest, engine: Engine) -> list[int]:
        messages.check_size(request, engine)
        if request.WhichOneof("prompt") == "token_ids":
            return messages.prompt_token_ids(request, engine)
        return await self._in_thread(messages.prompt_token_ids, request, engine)

    async def _in_thread[Request: Message, Result](
        self, function: Callable[[Request, Engine], Result], request: Request, engine: Engine
    ) -> Result:
        """Tokenizers and templates may take long: not in the event loop, and with a limit."""
        work = functools.partial(function, request, engine)
        return await self._texts.run(work, request.ByteSize(), TOKENIZE_TIMEOUT_SECONDS)

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
