"""scripts/serve.py on several hosts, which are processes here, with gloo between them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import trustme

from jaxserve.server.client import Client
from tests.hosts.test_trust import issue
from tests.models.golden import Golden
from tests.server.test_serve_process import check_prompts_and_errors

SERVE = Path(__file__).parents[2] / "scripts" / "serve.py"
CASES = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())["cases"]
START_TIMEOUT_SECONDS = 300
RECOVERY_SECONDS = 15
"""In which clients must learn that a host is gone."""
DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+")


def free_ports() -> int:
    """A port that is free, as is the one above it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port


class Group:
    """Two processes of scripts/serve.py with a device each, once they serve."""

    def __init__(self, folder: Path, flags: list[str], port: int) -> None:
        environment = os.environ | {"XLA_FLAGS": DEVICES.sub("", os.environ["XLA_FLAGS"]).strip()}
        # One that refuses: nothing between the hosts may go by it.
        environment |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
        command = [
            sys.executable, str(SERVE), *flags, "--port", str(port), "--hosts", "127.0.0.1,127.0.0.1",
            "--coordinator-port", str(free_ports()), "--compilation-cache", str(folder / "compiled"),
        ]  # fmt: skip
        self.logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            mine = [*command, "--host-rank", str(rank)]
            with log.open("w") as stderr:
                process = subprocess.Popen(mine, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
            self.processes.append(process)
        self.front_end, self.follower = self.processes
        watchdog = threading.Timer(START_TIMEOUT_SECONDS, self.kill)
        watchdog.start()
        served = any("SERVING" in line for line in self.front_end.stdout)
        watchdog.cancel()
        assert served, "\n".join(log.read_text()[-3000:] for log in self.logs)

    def leader_pid(self) -> int:
        """Of the process behind the front end."""
        children = Path(f"/proc/{self.front_end.pid}/task/{self.front_end.pid}/children").read_text().split()
        (leader,) = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(leader)

    def wait(self) -> list[int]:
        """The exit codes of front end and follower."""
        return [process.wait(timeout=RECOVERY_SECONDS) for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Group]]:
    with contextlib.ExitStack() as stack:

        def start(*flags: str, port: int) -> Group:
            group = Group(tmp_path, list(flags), port)
            stack.callback(group.kill)
            return group

        yield start


def tokens(client: Client, prompt: list[int], max_tokens: int) -> list[int]:
    responses = client.generate(prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [token for response in responses for token in response.token_ids]


def seconds_until_unavailable(client: Client, prompts: list[list[int]], strike: Callable[[], None]) -> float:
    """From the strike, in the middle of streams, to the last stream's end."""
    streams = [client.generate(prompt, max_tokens=None, ignore_eos=True) for prompt in prompts]
    for stream in streams:
        next(iter(stream))
    strike()
    struck_seconds = time.monotonic()
    for stream in streams:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return time.monotonic() - struck_seconds


def test_pipeline_across_hosts_survives_a_killed_one(
    start: Callable[..., Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of transformers; kill -9 of a host in mid-stream; the same again after a restart; a drain. All
    with a secret and certificates between hosts, and a key at the door, which the leader's process asks for as well.
    """
    certificates = issue(tmp_path / "group", trustme.CA())
    monkeypatch.setenv("JAXSERVE_GROUP_SECRET", "ours")
    monkeypatch.setenv("JAXSERVE_API_KEYS", "key")
    monkeypatch.setenv("JAXSERVE_API_KEY", "key")
    flags = ["--pipeline-parallel", "2", "--max-model-len", "256", "--token-budget", "16", "--max-num-seqs", "4"]
    flags += ["--group-certfile", certificates.chain, "--group-keyfile", certificates.key]
    flags += ["--group-ca-certs", certificates.authorities]
    cases = [case for case in CASES if len(case["prompt_token_ids"]) < 64][:3]
    assert len(cases) == 3
    port = free_ports()
    for end in ("kill", "drain"):
        started_seconds = time.monotonic()
        group = start(*flags, port=port)
        print(f"serving after {time.monotonic() - started_seconds:.1f} s")
        with Client(f"127.0.0.1:{port}") as client:
            for case in cases:
                assert tokens(client, case["prompt_token_ids"], 6) == case["output_token_ids"][:6]
            if end == "kill":
                prompts = [case["prompt_token_ids"] for case in cases]
                seconds = seconds_until_unavailable(client, prompts, group.follower.kill)
                print(f"kill -9 of a host: clients know after {seconds:.2f} s")
                assert seconds < RECOVERY_SECONDS
                assert group.wait() == [1, -signal.SIGKILL]
            else:
                check_prompts_and_errors(client)
                stream = client.generate(prompts[0], max_tokens=40, ignore_eos=True)
                next(iter(stream))
                group.follower.terminate()  # as a cluster does to any host, or to all
                *_, last = stream
                assert last.usage.output_tokens == 40
                assert group.wait() == [0, 0]


@pytest.mark.parametrize("strike", ["kill_leader", "freeze_follower"])
def test_tensor_parallel_across_hosts(start: Callable[..., Group], tiny_tokenizer: Path, strike: str) -> None:
    golden = Golden("yi_gqa")
    port = free_ports()
    flags = ["--model", str(golden.checkpoint), "--tokenizer", str(tiny_tokenizer), "--tensor-parallel", "2"]
    group = start(*flags, "--max-num-seqs", "4", "--token-budget", "16", port=port)
    with Client(f"127.0.0.1:{port}") as client:
        assert tokens(client, golden.prompt, len(golden.greedy)) == golden.greedy
        victim, number = (
            (group.leader_pid(), signal.SIGKILL) if strike == "kill_leader" else (group.follower.pid, signal.SIGSTOP)
        )
        seconds = seconds_until_unavailable(client, [golden.prompt] * 3, lambda: os.kill(victim, number))
        print(f"{strike}: clients know after {seconds:.2f} s")
        assert seconds < RECOVERY_SECONDS
    if strike == "freeze_follower":
        group.follower.kill()
    front_end, follower = group.wait()
    assert front_end == 1
    # jax's own watch over the leader may be faster than ours; it aborts.
    assert follower in ((1, -signal.SIGABRT) if strike == "kill_leader" else (-signal.SIGKILL,))
