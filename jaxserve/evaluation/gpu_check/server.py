"""The gRPC server under load: eight streams decode while long prompts arrive, under stall-free batching and without."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, replace

from jaxserve.cli import as_flags
from jaxserve.config import EngineConfig
from jaxserve.evaluation.gpu_check.models import SERVER, write_tiny
from jaxserve.evaluation.gpu_check.stage import ROOT, Context, StageFailed
from jaxserve.evaluation.latency import Percentiles, RunResult
from jaxserve.evaluation.load import measure_server
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.server.client import Client
from jaxserve.server.process import running_server

POLICIES = ("sarathi", "prefill_first")


@dataclass(frozen=True)
class Load:
    """Streams that decode one request after the other, and prompts that arrive meanwhile; lengths in tokens."""

    streams: int = 8
    stream_prompt: int = 64
    stream_output: int = 256
    prompt: int = 1800
    prompt_output: int = 8
    prompts_per_second: float = 4.0
    """So many that those gaps between tokens which a prompt stretches are more than one in a hundred."""
    seconds: float = 30.0


LOAD = Load()
TINY_LOAD = Load(2, 8, 16, 100, 2, 4.0, 1.0)
LEAST_SECONDS = 5.0
START_SECONDS = 30.0
"""About what a server takes to start and to end."""


def run(context: Context) -> None:
    config, load = SERVER, LOAD
    if context.tiny:
        model = write_tiny(context.out / "tiny")
        config, load = replace(config, model=model, token_budget=32, max_num_seqs=4, max_model_len=128), TINY_LOAD
    failed = []
    for number, policy in enumerate(POLICIES):
        left_seconds = context.left_seconds / (len(POLICIES) - number) - START_SECONDS
        load = replace(load, seconds=min(load.seconds, max(LEAST_SECONDS, left_seconds)))
        failed += _measure(context, config.with_policy(policy), load)
    if failed:
        raise StageFailed(f"{len(failed)} requests failed, the first with {failed[0]}")


def _measure(context: Context, config: EngineConfig, load: Load) -> list[str]:
    """Errors of requests."""
    start = time.monotonic()
    with running_server([sys.executable, str(ROOT / "scripts" / "serve.py"), "--port=0", *as_flags(config)]) as address:
        started_seconds = time.monotonic() - start
        streams, prompts = run_load(address, load)
    context.records.add(
        "server",
        policy=config.scheduler,
        token_budget=config.token_budget,
        seconds=load.seconds,
        started_seconds=started_seconds,
        **{f"tbt_p{percent}_seconds": Percentiles.of(streams.tbt_seconds).at(percent) for percent in (50, 99, 100)},
        **{f"ttft_p{percent}_seconds": Percentiles.of(prompts.ttft_seconds).at(percent) for percent in (50, 99)},
        num_prompts=len(prompts.requests),
        num_stream_tokens=streams.num_output_tokens,
        num_stalls=streams.num_stalls,
        errors=[*streams.errors, *prompts.errors],
    )
    return [*streams.errors, *prompts.errors]


def run_load(target: str, load: Load) -> tuple[RunResult, RunResult]:
    """What the streams saw, and what the prompts did."""
    with Client(target) as client:
        client.wait_ready(60)
        vocab_size = client.model_info().vocab_size
    stream = WorkloadRequest(0.0, load.stream_prompt, load.stream_output)
    prompts = [
        WorkloadRequest(number / load.prompts_per_second, load.prompt, load.prompt_output)
        for number in range(1, int(load.seconds * load.prompts_per_second) + 1)
    ]
    results: list[RunResult] = []

    def decode() -> None:
        most = [stream] * int(load.streams * (1 + load.seconds * 1000 / load.stream_output))
        results.append(
            measure_server(target, most, vocab_size=vocab_size, concurrency=load.streams, stop_seconds=load.seconds)
        )

    thread = threading.Thread(target=decode)
    thread.start()
    during = measure_server(target, prompts, vocab_size=vocab_size, seed=1)
    thread.join()
    return results[0], during
