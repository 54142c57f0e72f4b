"""Configurations that cannot work are refused with the field, the value and the limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig, cache_dir
from jaxserve.errors import ConfigError
from jaxserve.scheduler import POLICIES
from jaxserve.server.config import ServerConfig

WHOLE_PROMPT_POLICIES = [name for name, policy in POLICIES.items() if policy.runs_whole_prompts]
NAMES = ", ".join(POLICIES)


def error(config: type, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    return str(caught.value)


@pytest.mark.parametrize("name", ["max_model_len", "token_budget", "max_num_seqs", "block_size", "num_blocks"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "16"])
def test_counts(name: str, value: Any) -> None:
    assert error(EngineConfig, **{name: value}) == f"{name} must be an integer of at least 1, got {value!r}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model must not be empty"),
        ({"chat_template": "no/such"}, "chat_template must be a file that can be read, got 'no/such'"),
        (
            {"max_num_seqs": 17, "token_budget": 16},
            "max_num_seqs must not exceed token_budget (every running decode is in every batch), got 17 > 16",
        ),
        ({"max_logprobs": -2}, "max_logprobs must be an integer of at least -1, got -2"),
        ({"max_logprobs": True}, "max_logprobs must be an integer of at least -1, got True"),
        ({"block_size": 24}, "block_size must be a power of two in [8, 128], got 24"),
        ({"block_size": 4}, "block_size must be a power of two in [8, 128], got 4"),
        ({"block_size": 256}, "block_size must be a power of two in [8, 128], got 256"),
        ({"scheduler": "fifo"}, f"scheduler must be one of {NAMES}, got 'fifo'"),
        (
            {"scheduler": "orca", "chunk_schedule": "256"},
            "chunk_schedule is for the scheduler sarathi with a token_budget in tokens, got orca with 256",
        ),
        (
            {"token_budget": "auto", "chunk_schedule": "256", "slo_tbt_seconds": 0.1},
            "chunk_schedule is for the scheduler sarathi with a token_budget in tokens, got sarathi with auto",
        ),
        ({"slo_tbt_seconds": 0.0}, "slo_tbt_seconds must be positive and finite, got 0.0"),
        ({"slo_tbt_seconds": float("nan")}, "slo_tbt_seconds must be positive and finite, got nan"),
        ({"slo_tbt_seconds": float("inf")}, "slo_tbt_seconds must be positive and finite, got inf"),
        (
            {"scheduler": "adaptive", "token_budget": "auto"},
            "slo_tbt_seconds must be given for scheduler adaptive, got none",
        ),
        ({"scheduler": "adaptive"}, "slo_tbt_seconds must be given for scheduler adaptive, got none"),
        (
            {"token_budget": "auto", "slo_tbt_seconds": 0.1, "scheduler": "orca"},
            "scheduler orca runs whole prompts: token_budget must be at least max_model_len, got auto",
        ),
        *(
            (
                {"chunk_schedule": stages},
                "chunk_schedule must be falling integers from token_budget 256 down to max_num_seqs 16, separated by "
                f"commas, got '{stages}'",
            )
            for stages in ("", "256,", "many", "128,256", "257,16", "256,15", "-1")
        ),
        ({"gemm_backend": "cublas"}, "gemm_backend must be one of auto, no_split_k, cublaslt, got 'cublas'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"generation_config": "vllm"}, "generation_config must be one of auto, none, got 'vllm'"),
        ({"gpu_memory_utilization": 0.05}, "gpu_memory_utilization must be in [0.1, 1], got 0.05"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be in [0.1, 1], got 1.5"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be in [0.1, 1], got nan"),
        ({"seed": -1}, "seed must be in [0, 2147483647], got -1"),
        ({"seed": 2**31}, "seed must be in [0, 2147483647], got 2147483648"),
    ],
)
def test_engine_config(settings: dict[str, Any], message: str) -> None:
    assert error(EngineConfig, **settings) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": -1}, "port must be in [0, 65535], got -1"),
        ({"port": 65536}, "port must be in [0, 65535], got 65536"),
        ({"metrics_port": 65536}, "metrics_port must be in [0, 65535], got 65536"),
        ({"max_waiting": 0}, "max_waiting must be at least 1, got 0"),
        *(
            (
                {"allowed_origins": value},
                f"allowed_origins must be * or origins like https://example.org:8443 apart by commas, got {value!r}",
            )
            for value in ("", "example.org", "https://a,", "https://a/", "https://*.a", "https://a, https://b")
        ),
        ({"uds": "a", "http_port": 1}, "uds stands for http_port, got both, 'a' and 1"),
        ({"grpc_uds": ""}, "grpc_uds must not be empty"),
        ({"max_waiting_per_key": 0}, "max_waiting_per_key must be at least 1, got 0"),
        ({"max_message_bytes": 0}, "max_message_bytes must be at least 1, got 0"),
        ({"drain_seconds": -0.5}, "drain_seconds must not be negative, got -0.5"),
        ({"drain_seconds": float("nan")}, "drain_seconds must not be negative, got nan"),
        ({"step_timeout_seconds": 0.0}, "step_timeout_seconds must be positive, got 0.0"),
    ],
)
def test_server_config(settings: dict[str, Any], message: str) -> None:
    assert error(ServerConfig, **settings) == message


def test_limits_are_within_reach() -> None:
    EngineConfig(max_num_seqs=16, token_budget=16, block_size=8, gpu_memory_utilization=0.1, seed=2**31 - 1)
    EngineConfig(max_num_seqs=1, token_budget=1, block_size=128, gpu_memory_utilization=1, max_model_len=1)
    EngineConfig(chunk_schedule="256, 100,16,16")
    ServerConfig(port=0, metrics_port=65535, max_waiting=1, max_message_bytes=1, drain_seconds=0)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().token_budget = 1  # type: ignore[misc]


@pytest.mark.parametrize(("on_gpu", "block_size", "dtype"), [(False, 16, "float32"), (True, 64, "bfloat16")])
def test_resolve_fills_in_what_the_platform_decides(on_gpu: bool, block_size: int, dtype: str) -> None:
    resolved = EngineConfig().resolve(model_max_len=2048, on_gpu=on_gpu)
    assert (resolved.max_model_len, resolved.block_size, resolved.dtype) == (2048, block_size, dtype)


def test_resolve_keeps_what_was_chosen() -> None:
    config = EngineConfig(max_model_len=100, block_size=32, dtype="float16", num_blocks=5, token_budget=64)
    for model_max_len, on_gpu in ((2048, True), (100, False)):
        resolved = config.resolve(model_max_len=model_max_len, on_gpu=on_gpu)
        assert dataclasses.asdict(resolved) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 2049}, "max_model_len must not exceed the model's 2048 positions, got 2049"),
        *(
            (
                {"scheduler": name, "token_budget": 2047},
                f"scheduler {name} runs whole prompts: token_budget must be at least max_model_len, got 2047 < 2048",
            )
            for name in WHOLE_PROMPT_POLICIES
        ),
        (
            {"num_blocks": 128},
            "num_blocks must be at least 129 for max_model_len 2048 at block_size 16, got 128",
        ),
        (
            {"num_blocks": 8, "max_model_len": 113},
            "num_blocks must be at least 9 for max_model_len 113 at block_size 16, got 8",
        ),
    ],
)
def test_resolve_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings).resolve(model_max_len=2048, on_gpu=False)
    assert str(caught.value) == message


def test_resolve_accepts_the_least() -> None:
    EngineConfig(num_blocks=129).resolve(model_max_len=2048, on_gpu=False)
    for name in WHOLE_PROMPT_POLICIES:
        EngineConfig(scheduler=name, token_budget=2048).resolve(model_max_len=2048, on_gpu=False)
    for name in ("sarathi", "chunked_only"):
        EngineConfig(scheduler=name, token_budget=16).resolve(model_max_len=2048, on_gpu=False)


@pytest.mark.parametrize("slo_tbt_seconds", [0.1, None])
@pytest.mark.parametrize(("max_model_len", "token_budget"), [(8, 16), (512, 512), (4096, 2048)])
def test_an_automatic_budget_becomes_the_largest_to_try(
    max_model_len: int, token_budget: int, slo_tbt_seconds: float | None
) -> None:
    config = EngineConfig(token_budget="auto", slo_tbt_seconds=slo_tbt_seconds, max_model_len=max_model_len)
    assert config.needs_step_times == (slo_tbt_seconds is not None)
    assert config.resolve(model_max_len=8192, on_gpu=False).token_budget == token_budget


def test_chunk_schedule() -> None:
    assert EngineConfig(chunk_schedule="256, 100,16").chunk_budgets == (256, 100, 16)
    assert EngineConfig().chunk_budgets == ()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("JAXSERVE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "jaxserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "jaxserve"
