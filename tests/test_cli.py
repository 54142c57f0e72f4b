"""Flags and YAML agree, the command line wins, and what is wrong with either is told with the usage."""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli import as_flags, parse_config, read_config_file
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.hosts.group import HostsConfig
from jaxserve.scheduler import POLICIES
from jaxserve.server.config import ServerConfig

ROOT = Path(__file__).parents[1]


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


def test_help_has_flags_by_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    parallelism = text.index("\nparallelism:")
    assert text.index("\nbatching:") < text.index("\n  --token-budget ") < parallelism
    assert parallelism < text.index("\n  --tensor-parallel ") < text.index("\n  --data-parallel ")
    assert text.count("\noperations:") == 1, "headings of several configurations are one"


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig, HostsConfig])
def test_headings_begin_with_the_first_field_and_name_fields(config: type) -> None:
    names = [field.name for field in dataclasses.fields(config)]
    first, *others = config.HEADINGS
    assert first == names[0]
    assert [*others] == [name for name in names if name in others], "in the order of the fields"


def test_the_page_of_all_settings_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "make settings"
    assert "| `--warmup`, `--no-warmup` | `warmup` | `true` |" in page
    assert "| `--max-waiting-per-key` | `max_waiting_per_key` |  |" in page


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


def test_automatic_budget_from_flag_and_file(tmp_path: Path) -> None:
    expected = EngineConfig(token_budget="auto", slo_tbt_seconds=0.1)
    assert parse("--token-budget", "auto", "--slo-tbt", "0.1")[0] == expected
    assert parse("--config", settings_file(tmp_path, "token_budget: auto\nslo_tbt_seconds: 0.1\n"))[0] == expected


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
        ("scheduler: fifo\n", f"scheduler must be one of {', '.join(POLICIES)}, got 'fifo'"),
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
    with pytest.raises(
        ConfigError, match=r"unknown setting 'port' in .*; known: activations, attention_backend, block_size"
    ):
        read_config_file(path, EngineConfig)


def test_a_command_line_does_not_wait_for_numpy() -> None:
    """Most of what --help would take; the schedulers that configurations ask about need it only when one is made."""
    code = "import sys, jaxserve.cli, jaxserve.config; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
