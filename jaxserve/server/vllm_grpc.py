"""The methods of ``vllm.grpc.engine.VllmEngine``, which gateways speak with engines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial

from jaxserve.errors import RequestError
from jaxserve.request import Completion
from jaxserve.served_model import ServedModel
from jaxserve.server import vllm_grpc_messages as messages
from jaxserve.server.admission import Admission
from jaxserve.server.door import Context, check_response_size
from jaxserve.server.proto.vllm import vllm_engine_pb2 as pb
from jaxserve.server.proto.vllm import vllm_engine_pb2_grpc as pb_grpc
from jaxserve.server.text_threads import SHORT_BYTES, TextThreads

VLLM_NAME = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name


class VllmServicer(pb_grpc.VllmEngineServicer):
    """Translates between messages and the engines that ``admission`` leads to."""

    def __init__(self, admission: Admission, texts: TextThreads, max_message_bytes: int) -> None:
        self._admission, self._texts, self._max_message_bytes = admission, texts, max_message_bytes
        self._started_seconds = time.monotonic()
        self._sequences: dict[str, list[str]] = {}
        """Of the requests under way, what the engines call their sequences."""
        self._archive: bytes | None = None
        """The tokenizer's, once somebody has asked for it."""

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        with self._admission.request() as replicas:
            request_id = messages.request_id(request)
            token_ids = await self._token_ids(request, replicas.model)
            completions = messages.completions(request, request_id, token_ids, replicas.model)
            with (
                self._admission.request(num_sequences=len(completions) - 1),
                self._under_way(request_id, completions),
            ):
                async with contextlib.aclosing(replicas.generate_all(completions)) as deltas:
                    async for index, delta in deltas:
                        for response in messages.responses(request.stream, index, delta, completions[index]):
                            check_response_size(response.ByteSize(), self._max_message_bytes)
                            await context.write(response)

    @contextlib.contextmanager
    def _under_way(self, request_id: str, completions: Sequence[Completion]) -> Iterator[None]:
        """Known to Abort by this name as long as the block runs."""
        if request_id in self._sequences:
            raise RequestError(f"request_id must be unique among the requests in flight, got {request_id!r} again")
        self._sequences[request_id] = [completion.request_id for completion in completions]
        try:
            yield
        finally:
            del self._sequences[request_id]

    async def _token_ids(self, request: pb.GenerateRequest, model: ServedModel) -> list[int]:
        prompt = messages.prompt(request, model)
        encode = partial(model.token_ids, prompt, model.prompt_limit, messages.sampling(request))
        # Tokenizers may take long: not in the event loop, and with a limit.
        return encode() if prompt.token_ids is not None else await self._texts.run(encode, request.ByteSize())

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        replicas = self._admission.replicas()
        for request_id in request.request_ids:
            for name in self._sequences.get(request_id, ()):
                await replicas.abort(name)
        return pb.AbortResponse()

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        if self._admission.is_ready:
            return pb.HealthCheckResponse(healthy=True, message="requests are served")
        failed = self._admission.failed.is_set()
        return pb.HealthCheckResponse(message="the engine has stopped" if failed else "it warms up or drains")

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        replicas = self._admission.replicas()
        return messages.model_info(replicas.engine, replicas.model)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        replicas = self._admission.replicas()
        config = replicas.engine.config
        return pb.GetServerInfoResponse(
            active_requests=self._admission.num_active,
            uptime_seconds=time.monotonic() - self._started_seconds,
            server_type="vllm-grpc",
            data_parallel_size=1,
            block_size=config.block_size,
            model_dtype=config.dtype,
            max_num_seqs=config.max_num_seqs * len(replicas.recent),
        )

    async def GetTokenizer(self, request: pb.GetTokenizerRequest, context: Context) -> None:
        if self._archive is None:
            make = partial(messages.tokenizer_archive, self._admission.replicas().model.tokenizer)
            self._archive = await self._texts.run(make, SHORT_BYTES + 1)  # takes as long as a long text
        for chunk in messages.archive_chunks(self._archive):
            await context.write(chunk)
