"""scripts/serve.py as a process with the real engine: start, stop, and what a crash leaves behind."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import openai
import pytest

from jaxserve.server.client import Client
from jaxserve.server.proto.jaxserve.v1 import inference_pb2 as pb

SERVE = Path(__file__).parents[2] / "scripts" / "serve.py"
# One small bucket: little to compile.
SMALL = ["--max-model-len", "256", "--token-budget", "16", "--max-num-seqs", "4"]
START_TIMEOUT_SECONDS = 300
PROMPT = "The capital of France is"


class Server:
    """A process of scripts/serve.py that has reached SERVING."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.started_seconds = time.monotonic()
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVE), *SMALL, *flags], stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        watchdog = threading.Timer(START_TIMEOUT_SECONDS, self.process.kill)
        watchdog.start()
        lines = [self.process.stdout.readline()]
        if "--http-port" in flags:
            lines.append(self.process.stdout.readline())
        watchdog.cancel()
        match = re.fullmatch(
            r"(?:jaxserve: OpenAI's API at (\S+)/v1, a page at \S+/\n)?"
            r"jaxserve: SERVING model=smollm2-135m on (\S+) after [\d.]+ s\n",
            "".join(lines),
        )
        assert match, f"no SERVING but {lines!r}; the log: {log.read_text()[-3000:]}"
        self.url, self.target = match.groups()

    def end(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=60)


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> Server:
            server = Server(tmp_path / "serve.log", *flags)
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            return server

        yield start


def run_to_error(*flags: str) -> str:
    """The message of a start that must fail."""
    done = subprocess.run([sys.executable, str(SERVE), *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert not done.stdout
    return done.stderr


def test_crash_restart_and_drain(start, tmp_path):
    """One story, because every start costs seconds: kill -9 in mid-stream, restart on the same port, SIGTERM."""
    cache = ["--compilation-cache", str(tmp_path / "compiled")]
    first = start("--port", "0", *cache)
    with Client(first.target) as client:
        reference = "".join(r.text for r in client.generate(PROMPT, temperature=0.0, max_tokens=8))
        assert "Paris" in reference
        streams = [client.generate(PROMPT, max_tokens=None, ignore_eos=True) for _ in range(3)]
        for stream in streams:
            next(iter(stream))
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        for stream in streams:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    files = {path.name for path in (tmp_path / "compiled").rglob("*") if path.is_file()}
    assert files
    second = start("--port", first.target.rsplit(":")[-1], "--http-port", "0", *cache)
    assert second.target == first.target
    compiled = {path.name for path in (tmp_path / "compiled").rglob("*") if path.is_file()} - files
    assert not {name for name in compiled if not name.endswith("-atime")}, "the restart compiled again"

    assert f"port {second.target.rsplit(':')[-1]} is in use" in run_to_error("--port", second.target.rsplit(":")[-1])

    with Client(second.target) as client:
        assert "".join(r.text for r in client.generate(PROMPT, temperature=0.0, max_tokens=8)) == reference
        check_prompts_and_errors(client)
        check_http(second.url, client, reference)
        stream = iter(client.generate(PROMPT, max_tokens=100, ignore_eos=True))
        next(stream)
        second.process.send_signal(signal.SIGTERM)
        while client.ready():
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError) as caught:
            list(client.generate(PROMPT))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        *_, last = stream
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert last.usage.output_tokens == 100
        assert last.usage.num_stalls == 0
    assert second.process.wait(timeout=60) == 0


def check_prompts_and_errors(client: Client) -> None:
    """What the fake engine cannot show: chat, logprobs, the real engine's own checks, aborts."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in "".join(r.text for r in client.generate(question, temperature=0.0, max_tokens=12))
    token_ids = client.tokenize(PROMPT)
    assert client.detokenize(token_ids) == PROMPT
    (only,) = client.generate(token_ids, temperature=0.0, max_tokens=1, logprobs=2, prompt_logprobs=0)
    assert [len(position.candidates) for position in only.prompt_logprobs] == [0] + [1] * (len(token_ids) - 1)
    assert only.logprobs[0].candidates[0].token_id == only.token_ids[0]
    assert only.logprobs[0].candidates[0].rank == 1
    info = client.model_info()
    for prompt, field in [("", "prompt"), ([], "prompt"), ([info.vocab_size], "vocabulary"), ([1] * 256, "256")]:
        with pytest.raises(grpc.RpcError, match=field) as caught:
            list(client.generate(prompt))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    stream = client.generate(PROMPT, request_id="mine", max_tokens=None, ignore_eos=True)
    next(iter(stream))
    assert client.abort("mine")
    *_, last = stream
    assert last.finish_reason == pb.FINISH_REASON_ABORT


def check_http(url: str, client: Client, reference: str) -> None:
    """OpenAI's client gets what gRPC's does, to the last bit."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as http:
        asked = {"model": "smollm2-135m", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
        assert http.completions.create(**asked).choices[0].text == reference
        assert "".join(chunk.choices[0].text for chunk in http.completions.create(**asked, stream=True)) == reference
        question = [{"role": "user", "content": "What is the capital of France?"}]
        chat = http.chat.completions.create(model="smollm2-135m", messages=question, temperature=0, max_tokens=12)
        assert "Paris" in chat.choices[0].message.content
        token_ids = client.tokenize(PROMPT)
        (scored,) = client.generate(token_ids, temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=1)
        # As lm-eval asks: the prompt's tokens and one more, greedy where the chosen one is the likeliest, to the bit.
        echo = http.completions.create(model="smollm2-135m", prompt=[token_ids], echo=True, max_tokens=1, logprobs=1)
        found = echo.choices[0].logprobs
        expected = [position.candidates[0].logprob for position in scored.prompt_logprobs[1:]]
        np.testing.assert_array_equal(np.float32(found.token_logprobs[1:-1]), np.float32(expected))
        assert found.token_logprobs[0] is None
        assert len(found.tokens) == len(found.top_logprobs) == len(token_ids) + 1
        for wrong in ([[-1]], [[1], [10**9]], [[2**63]]):
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match="prompt holds token id "):
                    http.completions.create(model="smollm2-135m", prompt=wrong, logprobs=0, echo=True, stream=stream)
        alone = http.completions.create(model="smollm2-135m", prompt=PROMPT, echo=True, max_tokens=0, logprobs=0)
        assert alone.choices[0].text == PROMPT
        assert alone.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]


def test_sigterm_during_warm_up_ends_at_once(tmp_path):
    flags = [*SMALL, "--port", "0", "--compilation-cache", str(tmp_path)]
    with subprocess.Popen([sys.executable, str(SERVE), *flags], stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(START_TIMEOUT_SECONDS, process.kill)
        watchdog.start()
        assert any("compiling" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        watchdog.cancel()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--port", "0", "--model", "no/such-model"], "no/such-model"),
        (["--token-budget", "4"], "max_num_seqs must not exceed token_budget"),
    ],
)
def test_wrong_flags_are_clear_errors(flags, message):
    assert message in run_to_error(*flags)
