"""What an engine takes of a GPU's memory. The GPU is made up, with the memory of an H100."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import memory
from jaxserve.engine.memory import KV_CACHE_STEP_BYTES, budget_in_memory, choose_num_blocks, claim_gpu_memory
from jaxserve.errors import ConfigError
from jaxserve.models.loading.checkpoint import open_checkpoint

TOTAL_BYTES = 84929347584
NUM_PARAMETERS = 7_241_732_096
BLOCK_BYTES = 2 * 32 * 64 * 8 * 128 * 2
OURS, DEPRECATED = memory.FRACTION_VARIABLES


@pytest.fixture(autouse=True)
def _no_fraction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in memory.FRACTION_VARIABLES:
        monkeypatch.setenv(variable, "")  # set, so that what the test leaves is taken back
    monkeypatch.setattr(memory.xla_bridge, "backends_are_initialized", lambda: False)


def cache_bytes(fraction: float, in_use_bytes: int = 0, **settings: Any) -> int:
    """Of Mistral-7B's KV cache on a GPU of which jax has taken a fraction."""
    stats = {"bytes_limit": int(TOTAL_BYTES * fraction), "bytes_in_use": in_use_bytes}
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    mesh: Any = SimpleNamespace(local_devices=[gpu], size=1)
    config = EngineConfig(**{"model": "mistral-7b", "token_budget": 2048, "max_num_seqs": 128} | settings)
    weights = jax.ShapeDtypeStruct(
        (NUM_PARAMETERS,), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    resolved = config.resolve(model_max_len=32768, on_gpu=True)
    model = open_checkpoint("mistral-7b", "dummy").config
    return BLOCK_BYTES * choose_num_blocks(resolved, model, mesh, BLOCK_BYTES, [weights])


def test_an_engine_uses_the_card(caplog: pytest.LogCaptureFixture) -> None:
    """All that jax takes but weights and a step's memory, in whole multiples of 256 MiB."""
    claim_gpu_memory(0.92)
    assert float(os.environ[OURS]) == 0.92
    taken = cache_bytes(0.92)
    left = TOTAL_BYTES * 0.92 - 2 * NUM_PARAMETERS - taken
    assert taken % KV_CACHE_STEP_BYTES == 0
    assert 0.2e9 < left < 2e9
    assert cache_bytes(0.92, in_use_bytes=10_000) == taken, "other programs would be compiled"
    assert cache_bytes(0.92, gpu_memory_utilization=0.5) == pytest.approx(taken - 0.42 * TOTAL_BYTES, abs=3e8)
    assert caplog.messages == []


def test_engines_share_a_gpu() -> None:
    """Each takes its share of the whole, the second at most what the first has left."""
    claim_gpu_memory(0.4)
    assert float(os.environ[OURS]) == 0.92
    first = cache_bytes(0.92, gpu_memory_utilization=0.4)
    in_use_bytes = first + 2 * NUM_PARAMETERS
    assert cache_bytes(0.92, in_use_bytes, gpu_memory_utilization=0.4) == first
    assert 0 < cache_bytes(0.92, in_use_bytes, gpu_memory_utilization=0.9) < TOTAL_BYTES * 0.92 - in_use_bytes
    with pytest.raises(ConfigError, match=r"max_model_len 32768 needs \d+ bytes of KV cache, the device has 0 left"):
        cache_bytes(0.92, in_use_bytes=int(0.8 * TOTAL_BYTES))


@pytest.mark.parametrize("variable", [OURS, DEPRECATED])
def test_the_users_own_fraction_stays(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Jax refuses both of its variables at once, so the other one must not be set."""
    monkeypatch.setenv(variable, "0.5")
    claim_gpu_memory(0.92)
    assert sorted(os.environ[name] for name in (OURS, DEPRECATED)) == ["", "0.5"]
    assert cache_bytes(0.5) < 0.5 * TOTAL_BYTES - 2 * NUM_PARAMETERS
    assert "33.2 GiB of each GPU stay unused" in caplog.text


def test_a_notebook_that_has_used_jax_before(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory.xla_bridge, "backends_are_initialized", lambda: True)
    claim_gpu_memory(0.92)
    assert os.environ[OURS] == ""
    cache_bytes(0.75)
    assert caplog.messages == [
        "13.4 GiB of each GPU stay unused: jax takes 75 % of its memory, which was settled before the engine could ask "
        "for more. Make the engine before jax is first used, or set XLA_CLIENT_MEM_FRACTION=0.92"
    ]


def test_a_larger_share_is_claimed() -> None:
    claim_gpu_memory(0.97)
    assert float(os.environ[OURS]) == 0.97


def test_every_door_claims_before_jax_takes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several engines' devices are asked for before the first engine is made."""
    from jaxserve.engine import runner
    from jaxserve.server.serve import build_engines

    claimed: list[float] = []

    def claim(share: float) -> None:
        claimed.append(share)
        raise InterruptedError

    monkeypatch.setattr(memory, "claim_gpu_memory", claim)
    monkeypatch.setattr(runner, "claim_gpu_memory", claim)
    monkeypatch.setattr(jax, "devices", None)
    monkeypatch.setattr(jax, "default_backend", None)
    config = EngineConfig(gpu_memory_utilization=0.8)
    for door in (lambda: build_engines(config, 1), lambda: build_engines(config, 2), lambda: runner.prepare(config)):
        with pytest.raises(InterruptedError):
            door()
    assert claimed == [0.8] * 3


@pytest.mark.parametrize(("gib", "budget"), [(80, 2048), (16, 2048), (8, 1024), (6, 512), (1, 128)])
def test_the_largest_budget_that_the_memory_takes(gib: int, budget: int) -> None:
    """A tenth of the memory, but no less than the decodes."""
    config = EngineConfig(model="mistral-7b", token_budget="auto", max_num_seqs=128)
    resolved = config.resolve(model_max_len=32768, on_gpu=True)
    model = open_checkpoint("mistral-7b", "dummy").config
    assert budget_in_memory(resolved, model, gib * 2**30) == budget
    assert budget_in_memory(resolved, model, gib * 2**30, most=512) == min(512, budget)
    assert budget_in_memory(resolved, model, gib * 2**30, most=16) == 128, "every decode is in every step"
