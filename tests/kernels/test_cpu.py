"""Building the native CPU kernels, and doing without."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxserve.kernels import cpu
from jaxserve.kernels.attention import choose_backend

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """``cpu.available`` decides anew, with an empty cache folder, and again after the test."""
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    cpu.available.cache_clear()
    yield monkeypatch
    cpu.available.cache_clear()


def test_without_a_compiler_attention_runs_in_xla(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fresh.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", "cpu", FLOAT32) == "xla"
    (record,) = caplog.records
    assert "no C++ compiler found" in record.message
    with pytest.raises(ValueError, match="attention_backend native needs a CPU, float32 and a C\\+\\+ compiler"):
        choose_backend("native", "cpu", FLOAT32)


def test_a_failed_build_is_told_and_survived(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.cc"
    broken.write_text("int main( {")
    fresh.setattr(cpu, "SOURCE", broken)
    with caplog.at_level(logging.WARNING):
        assert not cpu.available()
    assert len(caplog.records) == 1
    assert "attention runs in plain XLA" in caplog.text


def test_only_float32_on_cpus_is_native() -> None:
    assert choose_backend("auto", "cpu", BFLOAT16) == "xla"
    assert choose_backend("auto", "gpu", FLOAT32) == "xla"
    assert choose_backend("xla", "cpu", FLOAT32) == "xla"
    with pytest.raises(ValueError, match="got gpu and bfloat16"):
        choose_backend("native", "gpu", BFLOAT16)


def test_the_library_is_built_once_for_each_compiler(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def pretend(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("made")
        return subprocess.CompletedProcess(command, 0, stdout=f"{command[0]} 1.0")

    fresh.setattr(subprocess, "run", pretend)
    library = cpu._build("one")
    assert library.read_text() == "made"
    assert [len(c) > 2 for c in commands] == [False, True, True], "version, compile, link"
    assert cpu._build("one") == library
    assert len(commands) == 4, "the version only"
    assert cpu._build("other") != library
    assert sorted(p.suffix for p in (tmp_path / "native").iterdir()) == [".so", ".so"]
