"""Building the native CPU kernels, and doing without."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxserve.kernels import native
from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.registry import choose_backend

CPU = Target("cpu")


def shape(dtype: str) -> AttentionShape:
    return AttentionShape(4, 2, 64, 16, jnp.dtype(dtype), jnp.dtype(dtype))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """``native.available`` decides anew, with an empty cache folder, and again after the test."""
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    native.available.cache_clear()
    yield monkeypatch
    native.available.cache_clear()


def test_without_a_compiler_attention_runs_in_xla(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fresh.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", CPU, shape("float32")).name == "xla"
    (record,) = caplog.records
    assert "no C++ compiler found" in record.message
    with pytest.raises(ValueError, match=r"native needs a CPU, float32 or bfloat16 .* and a C\+\+ compiler"):
        choose_backend("native", CPU, shape("float32"))


def test_a_failed_build_is_told_and_survived(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.cc"
    broken.write_text("int main( {")
    fresh.setattr(native, "SOURCES", (str(broken),))
    with caplog.at_level(logging.WARNING):
        assert not native.available()
    assert len(caplog.records) == 1
    assert "plain XLA runs instead" in caplog.text


def test_the_library_is_built_once_for_each_compiler(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def pretend(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("made")
        return subprocess.CompletedProcess(command, 0, stdout=f"{command[0]} 1.0")

    fresh.setattr(subprocess, "run", pretend)
    library = native._build("one")
    assert library.read_text() == "made"
    assert [len(c) > 2 for c in commands] == [False, True], "version, build"
    assert native._build("one") == library
    assert len(commands) == 3, "the version only"
    assert native._build("other") != library
    assert sorted(p.suffix for p in (tmp_path / "native").iterdir()) == [".so", ".so"]
