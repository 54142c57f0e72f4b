"""smg in front of two workers: openai's client through it, and one of the two killed in mid-stream.

Streams on the other finish, those on the killed one end with an error, and new requests are served.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

settings = json.loads(sys.argv[1])
START_SECONDS = 60
NUM_STREAMS = 6
LONG_TOKENS = 200
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def wait_ready(url: str, gateway: subprocess.Popen[bytes], log: Path) -> None:
    deadline_seconds = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline_seconds and gateway.poll() is None:
        try:
            workers = json.load(NO_PROXY.open(f"{url}/workers", timeout=5))
            if sum(worker["is_healthy"] for worker in workers["workers"]) == len(settings["workers"]):
                return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"smg did not find its workers:\n{log.read_text()[-3000:]}")


def ask(client: openai.OpenAI) -> str:
    asked = {key: settings[key] for key in ("model", "prompt", "max_tokens")}
    return client.completions.create(**asked, temperature=0).choices[0].text


def check(client: openai.OpenAI) -> None:
    assert ask(client) == settings["expected"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(model=settings["model"], messages=question, temperature=0, max_tokens=12)
    assert "Paris" in chat.choices[0].message.content, chat
    streams = [
        client.completions.create(
            model=settings["model"], prompt=settings["prompt"], temperature=0, max_tokens=LONG_TOKENS, stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(NUM_STREAMS)
    ]  # fmt: skip
    for stream in streams:
        next(stream)
    os.kill(settings["victim_pid"], signal.SIGKILL)

    def finish(stream: openai.Stream) -> bool:
        """Whether it came to its end."""
        try:
            return [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1:] == ["length"]
        except openai.OpenAIError:
            return False

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        finished = list(pool.map(finish, streams))
    assert any(finished), "no stream of the other worker finished"
    assert not all(finished), "no stream was on the worker that was killed"
    texts = [ask(client) for _ in range(NUM_STREAMS)]
    assert set(texts) == {settings["expected"]}, texts


port = free_port()
url = f"http://127.0.0.1:{port}"
with tempfile.TemporaryDirectory(prefix="smg-") as folder:
    log = Path(folder, "smg.log")
    command = [
        settings["smg"], "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin",
        "--prometheus-port", str(free_port()), "--worker-urls", *(f"grpc://{w}" for w in settings["workers"]),
    ]  # fmt: skip
    with log.open("wb") as output:
        gateway = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_ready(url, gateway, log)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            check(client)
    except Exception:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        gateway.terminate()
        gateway.wait(30)
