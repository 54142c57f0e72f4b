"""Configurations that cannot work are refused with the field, the value and the limit; flags and YAML agree."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import (
    EngineConfig,
    ServerConfig,
    as_flags,
    cache_dir,
    parse_config,
    read_config_file,
)
from jaxserve.errors import ConfigError
from jaxserve.scheduler import POLICIES

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
        (
            {"max_num_seqs": 17, "token_budget": 16},
            "max_num_seqs must not exceed token_budget (every running decode is in every batch), got 17 > 16",
        ),
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
        ({"token_budget": "auto"}, "slo_tbt_seconds must be given for token_budget auto, got none"),
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


@pytest.mark.parametrize(("max_model_len", "token_budget"), [(8, 16), (512, 512), (4096, 2048)])
def test_an_automatic_budget_becomes_the_largest_to_try(max_model_len: int, token_budget: int) -> None:
    config = EngineConfig(token_budget="auto", slo_tbt_seconds=0.1, max_model_len=max_model_len)
    assert config.resolve(model_max_len=8192, on_gpu=False).token_budget == token_budget


def test_automatic_budget_from_flag_and_file(tmp_path: Path) -> None:
    expected = EngineConfig(token_budget="auto", slo_tbt_seconds=0.1)
    assert parse("--token-budget", "auto", "--slo-tbt", "0.1")[0] == expected
    assert parse("--config", settings_file(tmp_path, "token_budget: auto\nslo_tbt_seconds: 0.1\n"))[0] == expected


def test_chunk_schedule() -> None:
    assert EngineConfig(chunk_schedule="256, 100,16").chunk_budgets == (256, 100, 16)
    assert EngineConfig().chunk_budgets == ()


def parse(*argv: str) -> tuple[EngineConfig, ServerConfig, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="test")
    parser.add_argument("--other", default="-")
    engine, server, args = parse_config(parser, argv, EngineConfig, ServerConfig)
    return engine, server, args


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def settings_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_without_flags() -> None:
    engine, server, args = parse()
    assert (engine, server, args.other) == (EngineConfig(), ServerConfig(), "-")


def test_flags() -> None:
    engine, server, args = parse(
        "--token-budget", "64", "--model", "m", "--gpu-memory-utilization", "0.5", "--drain-seconds", "2",
        "--block-size", "32", "--metrics-port", "9000", "--other", "x",
    )  # fmt: skip
    assert engine == EngineConfig(token_budget=64, model="m", gpu_memory_utilization=0.5, block_size=32)
    assert server == ServerConfig(drain_seconds=2.0, metrics_port=9000)
    assert args.other == "x"


def test_switches(tmp_path: Path) -> None:
    assert parse()[0].warmup
    assert not parse("--no-warmup")[0].warmup
    path = settings_file(tmp_path, "warmup: false\n")
    assert not parse("--config", path)[0].warmup
    assert parse("--config", path, "--warmup")[0].warmup, "the command line wins"


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(warmup=False, token_budget=64, model="-m=x")])
def test_a_configuration_as_flags(config: EngineConfig) -> None:
    assert parse(*as_flags(config))[0] == config


def test_every_field_has_a_flag_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in (*dataclasses.fields(EngineConfig), *dataclasses.fields(ServerConfig)):
        assert f"--{field.name.replace('_', '-')} " in text
        assert field.metadata["help"] in text


def test_file_with_dashes_and_underscores(tmp_path: Path) -> None:
    path = settings_file(
        tmp_path, "token-budget: 64\nmax_num_seqs: 8\ngpu-memory-utilization: 1\nmetrics_port: null\nport: 6000\n"
    )
    engine, server, _ = parse("--config", path)
    assert engine == EngineConfig(token_budget=64, max_num_seqs=8, gpu_memory_utilization=1.0)
    assert isinstance(engine.gpu_memory_utilization, float)
    assert server == ServerConfig(port=6000)


def test_command_line_wins(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "token_budget: 64\nmax_num_seqs: 8\n")
    engine, _, _ = parse("--token-budget", "32", "--config", path)
    assert (engine.token_budget, engine.max_num_seqs) == (32, 8)
    # Even where it asks for the default.
    assert parse("--config", path, "--token-budget", "256")[0].token_budget == 256


def test_empty_file(tmp_path: Path) -> None:
    assert parse("--config", settings_file(tmp_path, "# nothing\n"))[0] == EngineConfig()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--token_budgets", "1"], "unrecognized arguments: --token_budgets 1"),
        (["--token-budget", "many"], "argument --token-budget: invalid int or auto value: 'many'"),
        (["--token-budget", "0"], "token_budget must be an integer of at least 1, got 0"),
        (["--scheduler", "fifo"], "argument --scheduler: invalid choice: 'fifo'"),
        (
            ["--no-warmup", "--token-budget", "auto", "--slo-tbt-seconds", "1"],
            "warmup must be true for token_budget auto, which times every program, got false",
        ),
        (["--port", "70000"], "port must be in [0, 65535], got 70000"),
        (["--config", "/none.yaml"], "config: cannot read '/none.yaml': "),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert f"test: error: {message}" in usage_error(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token_budgets: 1\n", "config: unknown setting 'token_budgets' in "),
        ("1: 2\n", "config: unknown setting 1 in "),
        ("- token_budget\n", "must hold a mapping of settings, got list"),
        ("just text\n", "must hold a mapping of settings, got str"),
        ("0\n", "must hold a mapping of settings, got int"),
        ("[]\n", "must hold a mapping of settings, got list"),
        ("token_budget: [\n", "config: cannot read "),
        ("token_budget: many\n", "config: token_budget must be of type int or auto, got 'many' in "),
        ("token-budget: 1.5\n", "config: token-budget must be of type int or auto, got 1.5 in "),
        ("token_budget: true\n", "config: token_budget must be of type int or auto, got True in "),
        ("gpu_memory_utilization: false\n", "config: gpu_memory_utilization must be of type float, got False in "),
        ("warmup: 1\n", "config: warmup must be of type bool, got 1 in "),
        ("warmup: null\n", "config: warmup must be of type bool, got None in "),
        ("max_model_len: '64'\n", "config: max_model_len must be of type int, got '64' in "),
        ("model: 7\n", "config: model must be of type str, got 7 in "),
        ("token_budget: 0\n", "token_budget must be an integer of at least 1, got 0"),
        ("token_budget: null\n", "token_budget must "),
        ("seed: null\n", "seed must "),
        ("port: null\n", "port must "),
        ("gpu_memory_utilization: null\n", "gpu_memory_utilization must "),
        ("scheduler: fifo\n", f"scheduler must be one of {NAMES}, got 'fifo'"),
    ],
)
def test_wrong_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    assert message in usage_error(capsys, "--config", settings_file(tmp_path, text))


def test_a_file_that_is_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    assert "config: cannot read " in usage_error(capsys, "--config", str(path))


def test_settings_of_other_programs_are_unknown(tmp_path: Path) -> None:
    """A program without a server knows no port."""
    path = settings_file(tmp_path, "port: 1\n")
    assert read_config_file(path, EngineConfig, ServerConfig) == {"port": 1}
    with pytest.raises(ConfigError, match=r"unknown setting 'port' in .*; known: attention_backend, block_size"):
        read_config_file(path, EngineConfig)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("JAXSERVE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "jaxserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "jaxserve"
