"""Several engines behind one server: the least loaded first, and one surface for all."""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

import jax
import pytest
from grpc import StatusCode

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.server.client import Client
from jaxserve.server.config import ServerConfig
from jaxserve.server.process import running_server
from jaxserve.server.serve import build_engines
from tests.hosts.test_several_hosts import free_ports
from tests.models.golden import Golden
from tests.server.test_serve_process import SERVE


def test_requests_go_to_the_least_loaded(make_server, eventually):
    server = make_server(num_engines=3)

    def load() -> list[int]:
        return [len(engine.running) for engine in server.engines]

    with Client(server.target) as client:
        streams = [client.generate("abc", request_id=f"r{i}", max_tokens=None) for i in range(7)]
        for stream in streams:
            next(iter(stream))
        assert sorted(load()) == [2, 2, 3]
        victim = next(i for i, engine in enumerate(server.engines) if len(engine.running) == 2)
        names = list(server.engines[victim].running)
        assert all(client.abort(name) for name in names)
        assert load()[victim] == 0
        streams += [client.generate("abc", max_tokens=None) for _ in range(2)]
        for stream in streams[-2:]:
            next(iter(stream))
        assert load()[victim] == 2
        for stream in streams:
            stream.cancel()
        eventually(lambda: load() == [0, 0, 0])


def test_names_are_unique_among_all_engines(make_server, fails):
    server = make_server(num_engines=2)
    with Client(server.target) as client:
        stream = client.generate("abc", request_id="same", max_tokens=None)
        next(iter(stream))
        again = fails(StatusCode.INVALID_ARGUMENT, lambda: list(client.generate("abc", request_id="same")))
        assert "request_id must be unique among the requests in flight, got 'same' again" in again
        assert not client.abort("other")


def test_the_death_of_one_engine_is_that_of_the_server(make_server, fails):
    server = make_server(num_engines=2)
    with Client(server.target) as client:
        next(iter(client.generate("abc", max_tokens=None)))
        server.engine.step_error = RuntimeError("secret of the device")
        fails(StatusCode.UNAVAILABLE, lambda: [list(client.generate("abc", max_tokens=None)) for _ in range(2)])
        assert server.admission.failed.is_set()


def test_replicas_of_a_divided_model_on_devices_of_their_own(tiny_tokenizer: Path) -> None:
    """Two engines on two devices each; as many requests as they hold, so both serve."""
    golden = Golden("yi_gqa")
    metrics_port = free_ports()
    command = [
        sys.executable, str(SERVE), "--model", str(golden.checkpoint), "--tokenizer", str(tiny_tokenizer),
        "--tensor-parallel", "2", "--data-parallel", "2", "--max-num-seqs", "2", "--token-budget", "16",
        "--port", "0", "--metrics-port", str(metrics_port),
    ]  # fmt: skip
    with running_server(command) as target, Client(target) as client:
        params = {"temperature": 0.0, "max_tokens": len(golden.greedy), "ignore_eos": True}
        streams = [client.generate(golden.prompt, **params) for _ in range(4)]
        for stream in streams:
            assert [token for response in stream for token in response.token_ids] == golden.greedy
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(f"http://127.0.0.1:{metrics_port}/metrics").read().decode()
        for engine in (0, 1):
            (served,) = re.findall(
                rf'jaxserve_request_success_total{{engine="{engine}",finished_reason="length"}} (\S+)', text
            )
            assert float(served) == 2
            assert f'jaxserve_compiles_after_warmup{{engine="{engine}"}} 0.0' in text


def test_too_many_replicas_are_a_clear_error() -> None:
    num_devices = len(jax.devices())
    message = rf"data_parallel \* tensor_parallel must not exceed the {num_devices} devices, got 5 \* 2"
    with pytest.raises(ConfigError, match=message):
        build_engines(EngineConfig(tensor_parallel=2), 5)
    with pytest.raises(ConfigError, match="data_parallel must be at least 1, got 0"):
        ServerConfig(data_parallel=0)
