"""Building the native CPU kernels, and doing without."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxserve.errors import ConfigError
from jaxserve.kernels import native
from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.instruction_sets import AVX2, GENERIC, InstructionSet
from jaxserve.kernels.registry import choose_backend

CPU = Target("cpu")


def shape(dtype: str) -> AttentionShape:
    return AttentionShape(4, 2, 64, 16, jnp.dtype(dtype), jnp.dtype(dtype))


def forget() -> None:
    native.available.cache_clear()
    native.instruction_set.cache_clear()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """``native.available`` decides anew, with an empty cache folder, and again after the test."""
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))
    forget()
    yield monkeypatch
    forget()


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


def test_the_library_is_built_once_for_each_compiler_and_set(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def pretend(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("made")
        return subprocess.CompletedProcess(command, 0, stdout=f"{command[0]} 1.0")

    fresh.setattr(subprocess, "run", pretend)
    library = native._build("one", AVX2)
    assert library.read_text() == "made"
    version, *objects, link = commands
    assert version == ["one", "--version"]
    assert len(objects) == len(native.SOURCES)
    assert all({"-mavx2", "-mfma", "-mtune=znver2", "-c"} <= set(command) for command in objects)
    assert "-shared" in link
    commands.clear()
    assert native._build("one", AVX2) == library
    assert commands == [version]
    assert len({library, native._build("other", AVX2), native._build("one", GENERIC)}) == 3
    assert sorted(p.suffix for p in (tmp_path / "native").iterdir()) == [".so", ".so", ".so"]


def test_a_set_that_the_compiler_does_not_know_is_left_out(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native, "candidates_here", lambda: [InstructionSet("future", ("no-such-thing",)), GENERIC])
    fresh.setattr(native, "_compiler", lambda: "c++")
    fresh.setattr(native, "_knows", lambda compiler, one: one is GENERIC)
    assert native.instruction_set() is GENERIC


def test_a_forced_set_is_said_and_one_that_the_processor_lacks_is_refused(
    fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("JAXSERVE_CPU_ISA", "sse9")
    with pytest.raises(ConfigError, match=r"JAXSERVE_CPU_ISA must be .* runs: .*generic.*, got 'sse9'"):
        choose_backend("auto", CPU, shape("float32"))
    fresh.setenv("JAXSERVE_CPU_ISA", "generic")
    assert native._compiler() is None or native.instruction_set() is GENERIC
