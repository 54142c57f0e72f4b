"""Hostile requests in numbers: no fault, no hang, nothing left behind. FUZZ_CASES of each gRPC service and of HTTP.

make fuzz makes many, and lets schemathesis make as many (tests/clients/schemathesis_fuzz.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.evaluation.tiny_model import write_tiny_model
from jaxserve.server.client import Client
from jaxserve.server.config import ServerConfig
from tests.server import grpc_fuzz, http_fuzz
from tests.server.conftest import RunningServer

NUM_CASES = int(os.environ.get("FUZZ_CASES", "200"))
PROMPT = "The capital of France is"
MANY = settings(
    max_examples=NUM_CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A real engine, one for all."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    config = EngineConfig(
        model=str(folder), load_format="dummy", max_model_len=256, token_budget=16, max_num_seqs=4, num_blocks=100
    )
    settings = ServerConfig(port=0, http_port=0, served_model_name="tiny", drain_seconds=1.0)
    server = RunningServer(settings, [Engine(config)])
    server.set_ready()
    yield server
    server.close()


@pytest.fixture
def unharmed(
    tiny_server: RunningServer, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> Iterator[RunningServer]:
    """The server, which afterwards is idle, with all blocks back, has logged no fault, and says what it said before."""

    def greedy() -> str:
        with Client(tiny_server.target) as client:
            return "".join(r.text for r in client.generate(PROMPT, temperature=0.0, max_tokens=24, ignore_eos=True))

    engine, before = tiny_server.engine, greedy()
    yield tiny_server
    eventually(lambda: tiny_server.admission.num_active == 0 and not engine.has_unfinished())
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert tiny_server.admission.is_ready
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert greedy() == before


@pytest.mark.parametrize("service", grpc_fuzz.SERVICES)
def test_grpc(unharmed: RunningServer, service: str) -> None:
    with grpc.insecure_channel(unharmed.target) as channel:

        @MANY
        @given(case=grpc_fuzz.cases(service))
        def run(case: grpc_fuzz.Case) -> None:
            grpc_fuzz.check(channel, case)

        run()


def test_http(unharmed: RunningServer) -> None:
    @MANY
    @given(request=http_fuzz.requests())
    def run(request: http_fuzz.Request) -> None:
        http_fuzz.check(unharmed.url, request)

    run()
