"""The methods of ``jaxserve.v1.InferenceService``."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable

import orjson
from google.protobuf.message import Message

from jaxserve.errors import RequestError
from jaxserve.openai import ENDPOINTS
from jaxserve.served_model import ServedModel, any_of
from jaxserve.server import messages
from jaxserve.server.admission import Admission
from jaxserve.server.bodies import Bodies, parse_body, whole
from jaxserve.server.door import Context
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb
from jaxserve.server.proto.jaxserve.v1 import inference_pb2_grpc as pb_grpc
from jaxserve.server.replicas import Replicas
from jaxserve.server.text_threads import TextThreads


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Translates between messages and the engines that ``admission`` leads to."""

    def __init__(self, admission: Admission, texts: TextThreads, max_message_bytes: int) -> None:
        self._admission, self._texts, self._max_message_bytes = admission, texts, max_message_bytes
        self._bodies = Bodies(admission, texts)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        with self._admission.request(request.model) as replicas:
            await self._generate(replicas, request, context)

    async def _generate(self, replicas: Replicas, request: pb.GenerateRequest, context: Context) -> None:
        request_id = request.request_id or uuid.uuid4().hex
        messages.check_request_id("request_id", request_id)
        token_ids = await self._prompt_token_ids(request, replicas.model)
        params = messages.sampling_params(request.sampling_params, replicas.model, len(token_ids))
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
        return pb.AbortResponse(aborted=await self._admission.replicas().abort(request.request_id))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return messages.model_info(self._admission.replicas().engine)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        model = self._admission.replicas(request.model).model
        return pb.TokenizeResponse(token_ids=await self._prompt_token_ids(request, model))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        model = self._admission.replicas(request.model).model
        messages.check_size(request, model)
        text = await self._in_thread(messages.text_of, request, model)
        return pb.DetokenizeResponse(text=text)

    async def Respond(self, request: pb.RespondRequest, context: Context) -> pb.RespondResponse:
        endpoint = next((endpoint for endpoint in ENDPOINTS if endpoint.path == request.path), None)
        if endpoint is None:
            raise RequestError(f"path must be {any_of([e.path for e in ENDPOINTS])}, got {request.path!r:.80}")
        with self._admission.request() as replicas:
            ask = endpoint.parse(parse_body(request.body), replicas.model)
            if ask.stream:
                raise RequestError("stream must be false, got true")
            async with self._bodies.started(endpoint, ask, replicas, len(request.body)) as (response, deltas):
                return pb.RespondResponse(body=orjson.dumps(await whole(response, deltas)))

    async def _prompt_token_ids(
        self, request: pb.GenerateRequest | pb.TokenizeRequest, model: ServedModel
    ) -> list[int]:
        messages.check_size(request, model)
        if request.WhichOneof("prompt") == "token_ids":
            return messages.prompt_token_ids(request, model)
        return await self._in_thread(messages.prompt_token_ids, request, model)

    async def _in_thread[Request: Message, Result](
        self, function: Callable[[Request, ServedModel], Result], request: Request, model: ServedModel
    ) -> Result:
        """Tokenizers and templates may take long: not in the event loop, and with a limit."""
        return await self._texts.run(functools.partial(function, request, model), request.ByteSize())
