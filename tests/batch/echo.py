"""An engine without a model, and batches that it serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxserve import EngineConfig, RequestError, SamplingParams
from jaxserve.batch import BatchInput, BatchRun, BatchSummary, EngineServer, ResultFile, Shard
from jaxserve.engine.metrics import StepRecord
from jaxserve.request import FinishReason, Logprob, RequestDelta, RequestMetrics

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL, MAX_MODEL_LEN = "echo", 100

WHOLE = Shard()
NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


class EchoTokenizer:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in ("^" if add_special_tokens else "") + text]

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def check(self, text: str) -> None:
        """Takes all."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def decode_stream(self, skip_special_tokens: bool, after: list[int]) -> Any:
        return SimpleNamespace(step=chr)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class EchoEngine:
    """Gives each request a letter x a step; ``interrupt_at`` is the step at which the user interrupts."""

    def __init__(self, config: EngineConfig | None = None, interrupt_at: int | None = None) -> None:
        self.config = SimpleNamespace(model=MODEL, max_num_seqs=2, token_budget=8)
        self.on_step: list[Any] = []
        self.tokenizer = EchoTokenizer()
        self.max_model_len = MAX_MODEL_LEN
        self.model_config = SimpleNamespace(vocab_size=2**21)
        self.sampling_defaults: dict[str, Any] = {}
        self.interrupt_at = interrupt_at
        self.running: dict[str, list[Any]] = {}
        self.max_in_flight = self.num_steps = 0
        self.closed = False

    def validate(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        if len(prompt_token_ids) >= MAX_MODEL_LEN:
            raise RequestError(f"prompt of {len(prompt_token_ids)} tokens exceeds max_model_len {MAX_MODEL_LEN}")

    def grammar_of(self, params: SamplingParams) -> None:
        """Has none."""

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, grammar: None = None
    ) -> None:
        assert request_id not in self.running
        self.running[request_id] = [prompt_token_ids, params, 0]
        self.max_in_flight = max(self.max_in_flight, len(self.running))

    def abort(self, request_id: str) -> bool:
        return self.running.pop(request_id, None) is not None

    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> list[RequestDelta]:
        self.num_steps += 1
        if self.num_steps == self.interrupt_at:
            raise KeyboardInterrupt
        for observe in self.on_step:
            observe(StepRecord(num_tokens=len(self.running)), [])
        return [self._advance(request_id) for request_id in list(self.running)]

    def close(self) -> None:
        self.closed = True

    def _advance(self, request_id: str) -> RequestDelta:
        request = self.running[request_id]
        request[2] += 1
        prompt, params, num_tokens = request
        last = num_tokens == (params.max_tokens or 3)
        if last:
            del self.running[request_id]
        # Asked for alternatives, it says that y would have been the likeliest.
        alternatives = {ord("y"): Logprob(-0.5, 1), ord("z"): Logprob(-1.5, 3)}
        entry = {ord("x"): Logprob(-1.0, 2)} | dict(list(alternatives.items())[: params.logprobs])
        return RequestDelta(
            request_id=request_id,
            token_ids=[ord("x")],
            text="x",
            logprobs=None if params.logprobs is None else [entry],
            prompt_logprobs=None,
            finish_reason=FinishReason.LENGTH if last else None,
            stop_reason=None,
            metrics=RequestMetrics(arrival_seconds=0.0),
            num_prompt_tokens=len(prompt),
        )


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    body = body or {"prompt": "hello", "max_tokens": 2}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))
    return path


def run(
    engine: Any,
    source: Path,
    destination: Path,
    shard: Shard = WHOLE,
    names: Sequence[str] = (),
    first: str = "input",
) -> BatchSummary:
    with BatchInput([source], shard) as lines, ResultFile(destination) as results:
        return BatchRun(EngineServer(engine, names, first), lines, results, show_progress=False).run()


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_text()
    assert not data or data.endswith("\n")
    return [json.loads(one) for one in data.splitlines()]


LINES: list[dict[str, Any] | str] = [
    *(line(str(i), prompt="hello", max_tokens=1 + i % 5) for i in range(30)),
    "{",
    line("bad", prompt="hello", top_p=0),
]


def answers(path: Path) -> list[str]:
    """All results in order of their ids, without the time of day and what was cached by then."""
    results = read(path)
    for result in results:
        if result["error"] is None:
            body = result["response"]["body"]
            del body["created"], body["usage"]["prompt_tokens_details"]
    return sorted(json.dumps(result) for result in results)
