"""A fake engine behind the real gRPC server, whose event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.metrics import EngineMetrics, StepRecord
from jaxserve.errors import RequestError
from jaxserve.grammars import Grammar
from jaxserve.models.config import ModelConfig
from jaxserve.request import FinishReason, Logprob, RequestDelta, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.server.client import Client
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import Server

MAX_MODEL_LEN = 1000
VOCAB_SIZE = 160
PADDING = 32
"""Ids of the model that its tokenizer does not know."""
STEP_SECONDS = 0.005


class FakeTokenizer:
    """One token per ASCII character."""

    vocab_size = VOCAB_SIZE - PADDING
    token_length = SimpleNamespace(max_characters=1)

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None, limit_name: str = ""
    ) -> list[int]:
        if text == "break":
            raise RuntimeError("secret of the tokenizer")
        if max_tokens is not None and len(text) > max_tokens:
            raise RequestError(f"prompt of {len(text)} tokens exceeds {limit_name} {max_tokens}")
        return [ord(c) for c in text]

    def check(self, text: str) -> None:
        """Takes all."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i < self.vocab_size and (i or not skip_special_tokens))

    def decode_stream(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> SimpleNamespace:
        return SimpleNamespace(step=chr)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def token(self, token_id: int) -> str:
        return chr(token_id)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


@dataclass
class FakeRequest:
    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    num_output_tokens: int = 0


class FakeEngine:
    """Each step gives every request the letter x; reports aborts one step late, as the real engine does."""

    def __init__(self) -> None:
        self.config = EngineConfig(model="fake", max_model_len=MAX_MODEL_LEN, dtype="float32", block_size=16)
        self.model_config = ModelConfig(
            architecture="Fake", vocab_size=VOCAB_SIZE, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=8, max_position_embeddings=MAX_MODEL_LEN, norm_eps=1e-5,
        )  # fmt: skip
        self.tokenizer = FakeTokenizer()
        self.metrics = EngineMetrics(token_budget=64, num_blocks=100)
        self.eos_token_ids = (0,)
        self.max_model_len = MAX_MODEL_LEN
        self.sampling_defaults: dict[str, Any] = {}
        self.running: dict[str, FakeRequest] = {}
        self.aborted: list[str] = []
        self.last_deltas: list[RequestDelta] = []
        self.step_error: Exception | None = None
        self.starved: set[str] = set()
        """Requests that get no tokens."""
        self.num_steps = 0
        self.on_step: list[Callable[[StepRecord, list[Chunk]], None]] = []
        self.closed = False

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        arrival_seconds: float | None = None,
        grammar: Grammar | None = None,
        client: str = "",
    ) -> None:
        if prompt_token_ids == [1]:
            raise RuntimeError("secret of the engine")
        if not prompt_token_ids:
            raise RequestError("prompt must hold at least one token, got none")
        if len(prompt_token_ids) >= MAX_MODEL_LEN:
            raise RequestError(f"prompt of {len(prompt_token_ids)} tokens exceeds max_model_len {MAX_MODEL_LEN}")
        assert request_id not in self.running
        metrics = RequestMetrics(arrival_seconds if arrival_seconds is not None else time.monotonic())
        self.running[request_id] = FakeRequest(prompt_token_ids, params, metrics)

    def grammar_of(self, params: SamplingParams) -> None:
        """Writes what it likes."""

    def abort(self, request_id: str) -> bool:
        request = self.running.pop(request_id, None)
        if request is None:
            return False
        self.aborted.append(request_id)
        self.last_deltas.append(self._delta(request_id, request, "", FinishReason.ABORT))
        return True

    def has_unfinished(self) -> bool:
        return bool(self.running or self.last_deltas)

    def step(self) -> list[RequestDelta]:
        self.num_steps += 1
        time.sleep(STEP_SECONDS)
        if self.step_error is not None:
            raise self.step_error
        for observe in self.on_step:
            observe(StepRecord(num_rows=self.num_steps), [])
        deltas, self.last_deltas = self.last_deltas, []
        for request_id, request in list(self.running.items()):
            if request_id in self.starved:
                continue
            now_seconds = time.monotonic()
            request.metrics.first_scheduled_seconds = request.metrics.first_scheduled_seconds or now_seconds
            request.metrics.token_seconds.append(now_seconds)
            request.num_output_tokens += 1
            limit = request.params.max_tokens or MAX_MODEL_LEN - len(request.prompt_token_ids)
            reason = FinishReason.LENGTH if request.num_output_tokens == limit else None
            if "x" in request.params.stop:
                reason = FinishReason.STOP
            if reason is not None:
                del self.running[request_id]
            deltas.append(self._delta(request_id, request, "x", reason))
        return deltas

    def close(self) -> None:
        self.closed = True

    def _delta(self, request_id: str, request: FakeRequest, text: str, reason: FinishReason | None) -> RequestDelta:
        params, first = request.params, request.num_output_tokens == 1
        entry = {ord("x"): Logprob(-0.5, 1), ord("y"): Logprob(-1.5, 2)}
        scored = [None, *[entry] * (len(request.prompt_token_ids) - 1)]
        return RequestDelta(
            request_id=request_id,
            token_ids=[ord(c) for c in text],
            text=text,
            logprobs=[entry] if text and params.logprobs is not None else None,
            prompt_logprobs=scored if first and params.prompt_logprobs is not None else None,
            finish_reason=reason,
            stop_reason="x" if reason is FinishReason.STOP else None,
            metrics=request.metrics,
            num_prompt_tokens=len(request.prompt_token_ids),
        )


class RunningServer:
    """A Server on free ports."""

    def __init__(self, config: ServerConfig, engines: Sequence[Any]) -> None:
        self.engines = engines
        self.engine = engines[0]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.call(self._start(config))
        self.admission = self.server.admission
        self.target = self.server.grpc.address

    @staticmethod
    async def _start(config: ServerConfig) -> Server:
        server = Server(config)
        await server.start()
        return server

    @property
    def url(self) -> str:
        """Of the HTTP door."""
        assert self.server.http is not None
        return self.server.http.address

    def submit[T](self, coroutine: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call[T](self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.submit(coroutine).result(timeout=30)

    def set_ready(self) -> None:
        self.call(self.server.set_ready(self.engines))

    def close(self) -> None:
        self.call(self.server.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_server() -> Iterator[Callable[..., RunningServer]]:
    servers = []

    def make(*, ready: bool = True, num_engines: int = 1, **settings: Any) -> RunningServer:
        engines = [FakeEngine() for _ in range(num_engines)]
        server = RunningServer(ServerConfig(**{"port": 0, "drain_seconds": 0.1, **settings}), engines)
        servers.append(server)
        if ready:
            server.set_ready()
        return server

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., RunningServer]) -> RunningServer:
    return make_server()


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


@pytest.fixture
def channel_to() -> Iterator[Callable[[RunningServer], grpc.Channel]]:
    """Opens a channel, which is closed afterwards."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(grpc.insecure_channel(server.target))


@pytest.fixture
def fails() -> Callable[..., str]:
    """Calls a function that must end with this status; gives its message."""

    def fails(code: grpc.StatusCode, function: Callable[[], Any]) -> str:
        with pytest.raises(grpc.RpcError) as caught:
            function()
        assert caught.value.code() is code, caught.value
        return caught.value.details()

    return fails


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits for a condition that another thread brings about."""

    def eventually(condition: Callable[[], Any], timeout_seconds: float = 5.0) -> None:
        deadline_seconds = time.monotonic() + timeout_seconds
        while not condition():
            assert time.monotonic() < deadline_seconds, "the condition never came true"
            time.sleep(0.005)

    return eventually
