"""Real clients against the real server, each a script in an environment of its own: make test-clients.

Not collected with the other tests, whose environment has none of these clients but openai's.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.server.client import Client
from jaxserve.server.proto.vllm import vllm_engine_pb2 as vllm_pb
from jaxserve.server.proto.vllm import vllm_engine_pb2_grpc as vllm_grpc
from tests.server.test_serve_process import Server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPENAI, TRITON, LOAD, EXTRAS = (ROOT / ".clients" / name / "bin" for name in ("openai", "triton", "load", "extras"))
TIMEOUT_SECONDS = 240
FLAGS = [
    "--chat-template",
    str(HERE / "tools.jinja"),
    "--port",
    "0",
    "--max-model-len",
    "1024",
    "--token-budget",
    "64",
    "--max-num-seqs",
    "8",
]
SMALL = {"token_budget": 64, "max_num_seqs": 8, "max_model_len": 1024}
GOLDEN = json.loads((ROOT / "tests" / "golden" / "smollm2_greedy.json").read_text())
CHOICES = [
    {"context": "The capital of France is", "choices": [" Paris", " London", " a banana"], "answer": 0},
    {"context": "Two plus two is", "choices": [" four", " purple", " Wednesday, of course"], "answer": 0},
    {"context": "The opposite of hot is", "choices": [" seven", " cold"], "answer": 1},
]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "serve.log", *FLAGS, "--http-port", "0")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def settings(server: Server) -> dict[str, Any]:
    """What every script is told: where the server is, and a prompt with transformers' greedy continuation."""
    (case,) = [case for case in GOLDEN["cases"] if case["name"] == "raw_short"]
    with Client(server.target) as client:
        expected = client.detokenize(case["output_token_ids"][:8])
    return {
        "model": "smollm2-135m", "target": server.target, "base_url": f"{server.url}/v1",
        "prompt": case["prompt"], "expected": expected, "max_tokens": 8,
    }  # fmt: skip


def run(
    *command: str | Path, stdin: str = "", cwd: Path | None = None, timeout_seconds: float = TIMEOUT_SECONDS
) -> str:
    """What the command prints; fails with the end of what it said."""
    environment = os.environ | {"NO_PROXY": "*", "no_proxy": "*"}
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "PYTHONPATH"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            list(map(str, command)), input=stdin, capture_output=True, text=True, timeout=timeout_seconds,
            env=environment, cwd=cwd,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{command[0]} took over {timeout_seconds:g} s: {late.stderr!s:.3000}", pytrace=False)
    if done.returncode != 0:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        pytest.fail(f"{command[0]} {command[1]} ended with {done.returncode}:\n{said}", pytrace=False)
    return done.stdout


def run_script(environment: Path, name: str, settings: dict[str, Any]) -> str:
    return run(environment / "python", HERE / name, json.dumps(settings))


def test_openai(settings: dict[str, Any]) -> None:
    run_script(OPENAI, "openai_client.py", settings)


def test_langchain(settings: dict[str, Any]) -> None:
    run_script(OPENAI, "langchain_client.py", settings)


def test_tritonclient(settings: dict[str, Any]) -> None:
    run_script(TRITON, "triton_client.py", settings)


@pytest.fixture(scope="session")
def tokenizer(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer's files, as gateways get them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    with grpc.insecure_channel(server.target) as channel:
        chunks = vllm_grpc.VllmEngineStub(channel).GetTokenizer(vllm_pb.GetTokenizerRequest())
        zipfile.ZipFile(io.BytesIO(b"".join(chunk.data for chunk in chunks))).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def evaluation(server: Server, settings: dict[str, Any]) -> dict[str, Any]:
    """What lm-eval has to find: the log-likelihoods that gRPC gives for the same texts."""
    with Client(server.target) as client:
        choices = [c | {"logprobs": [log_likelihood(client, c["context"], e) for e in c["choices"]]} for c in CHOICES]
    hits = [max(range(len(c["logprobs"])), key=c["logprobs"].__getitem__) == c["answer"] for c in choices]
    return settings | {"choices": choices, "accuracy": sum(hits) / len(hits)}


def test_lm_eval(evaluation: dict[str, Any], tokenizer: Path) -> None:
    model_args = {
        "model": evaluation["model"], "base_url": f"{evaluation['base_url']}/completions", "num_concurrent": 4,
        "tokenizer": str(tokenizer), "max_retries": 1, "max_length": 512,
    }  # fmt: skip
    run_script(LOAD, "lm_eval_client.py", evaluation | {"harness_model": "local-completions", "model_args": model_args})


def test_lm_eval_on_an_engine(evaluation: dict[str, Any]) -> None:
    model_args = {"pretrained": evaluation["model"], **SMALL}
    run_script(EXTRAS, "lm_eval_client.py", evaluation | {"harness_model": "jaxserve", "model_args": model_args})


def test_eval_writes_completions_of_humaneval_and_goes_on(tmp_path: Path) -> None:
    samples, cache = tmp_path / "samples.jsonl", tmp_path / "answers"
    model_args = ",".join(f"{name}={value}" for name, value in {"max_gen_toks": 8, **SMALL}.items())
    command = [EXTRAS / "python", ROOT / "scripts" / "eval.py", "humaneval", samples, "--use_cache", cache]
    told = [*command, "--model_args", model_args, "--gen_kwargs", "max_gen_toks=8"]
    run(*told, "--limit", "2", cwd=tmp_path)
    first = samples.read_text()
    assert [json.loads(line)["task_id"] for line in first.splitlines()] == ["HumanEval/0", "HumanEval/1"]
    run(*told, "--limit", "3", cwd=tmp_path)
    assert samples.read_text().startswith(first)
    assert len(samples.read_text().splitlines()) == 3


def test_ray(settings: dict[str, Any], tmp_path: Path) -> None:
    run_script(EXTRAS, "ray_client.py", settings | {"folder": str(tmp_path), "engine": SMALL})


def log_likelihood(client: Client, context: str, continuation: str) -> float:
    token_ids, num_context = client.tokenize(context + continuation), len(client.tokenize(context))
    (response,) = client.generate(token_ids, max_tokens=1, temperature=0.0, prompt_logprobs=0)
    return sum(position.candidates[0].logprob for position in response.prompt_logprobs[num_context:])


def test_aiperf(server: Server, settings: dict[str, Any], tokenizer: Path) -> None:
    """A short run of a load generator, over the endpoint of chats."""
    run(
        LOAD / "aiperf", "profile", "--model", settings["model"], "--url", server.url, "--endpoint-type", "chat",
        "--streaming", "--concurrency", "4", "--request-count", "12", "--tokenizer", f"./{tokenizer.name}",
        "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--extra-inputs", "ignore_eos:true",
        "--use-server-token-count", "--ui-type", "none", "--artifact-dir", "results", cwd=tokenizer.parent,
    )  # fmt: skip
    results = json.loads((tokenizer.parent / "results" / "profile_export_aiperf.json").read_text())
    assert results["request_count"]["avg"] == 12, results
    assert results["output_sequence_length"]["min"] == results["output_sequence_length"]["max"] == 16, results


def test_buf_curl(settings: dict[str, Any]) -> None:
    """jaxserve.v1 as JSON, by reflection alone."""
    url = f"http://{settings['target']}/jaxserve.v1.InferenceService"
    buf = [OPENAI / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    tokens = json.loads(run(*buf, "--data", json.dumps({"text": settings["prompt"]}), f"{url}/Tokenize"))
    sampling = {"maxTokens": 8, "temperature": 0}
    asked = json.dumps({"tokenIds": {"ids": tokens["tokenIds"]}, "samplingParams": sampling})
    output, decoder = run(*buf, "--data", asked, f"{url}/Generate"), json.JSONDecoder()
    text, last = "", {}
    while output := output.lstrip():
        last, end = decoder.raw_decode(output)
        text, output = text + last.get("text", ""), output[end:]
    assert text == settings["expected"]
    assert last["finishReason"] == "FINISH_REASON_LENGTH"


def test_buf_lint() -> None:
    run(OPENAI / "buf", "lint", ROOT)


def test_curl(settings: dict[str, Any]) -> None:
    body = {key: settings[key] for key in ("model", "prompt", "max_tokens")} | {"temperature": 0, "stream": True}
    url = f"{settings['base_url']}/completions"
    command = ["curl", "-sSN", "--noproxy", "*", url, "-H", "Content-Type: application/json", "-d", "@-"]
    *events, end = run(*command, stdin=json.dumps(body)).strip().split("\n\n")
    assert end == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == settings["expected"]


def test_smg(server: Server, settings: dict[str, Any], tmp_path: Path) -> None:
    victim = Server(tmp_path / "victim.log", *FLAGS)
    try:
        workers = {"workers": [server.target, victim.target], "victim_pid": victim.process.pid}
        run_script(OPENAI, "smg_client.py", settings | workers | {"smg": str(TRITON / "smg")})
    finally:
        victim.process.kill()
        victim.process.wait()
    assert server.process.poll() is None
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{server.url}/ready", timeout=5) as ready:
        assert ready.status == 200
