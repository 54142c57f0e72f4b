"""What is said of a GPU that is taken, with an nvidia-smi that says what it is told to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxserve.engine import gpus
from jaxserve.engine.gpus import check_gpu_is_free
from jaxserve.errors import ConfigError

USERS = "4711, /usr/bin/python3, 61440\n4712, ollama, [N/A]"


def set_platforms(monkeypatch: pytest.MonkeyPatch, platforms: str | None) -> None:
    monkeypatch.setattr(gpus, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms)))


@pytest.fixture(autouse=True)
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if jax would use them."""
    set_platforms(monkeypatch, None)
    monkeypatch.setattr(gpus, "PLUGINS", ("jax",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: str, users: str) -> Path:
    script = folder / "nvidia-smi"
    answer = f"case \"$*\" in *query-gpu*) echo '{memory}';; *) echo '{users}';; esac"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{answer}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder / "asked"


def test_a_gpu_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "81559, 19000", USERS)
    with pytest.raises(ConfigError) as caught:
        check_gpu_is_free(0.92)
    assert str(caught.value) == (
        "gpu_memory_utilization 0.92 needs 73.3 GiB of GPU 0, which has 18.6 of 79.6 GiB free. The rest is taken by "
        "process 4711 (/usr/bin/python3), 60.0 GiB; process 4712 (ollama), unknown memory. End them, as by shutting "
        "down another notebook's kernel, or lower gpu_memory_utilization"
    )
    check_gpu_is_free(0.2)


def test_processes_of_other_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(tmp_path, monkeypatch, "81559, 10", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,GPU-def")
    with pytest.raises(ConfigError, match=r"of GPU GPU-abc, .* by processes that nvidia-smi does not show here"):
        check_gpu_is_free(0.5)
    assert all(line.startswith("--id=GPU-abc ") for line in asked.read_text().splitlines())


@pytest.mark.parametrize("memory", ["[N/A], [N/A]", "", "81559, 81000"])
def test_nothing_is_said_where_nothing_is_wrong_or_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    install(tmp_path, monkeypatch, memory, USERS)
    check_gpu_is_free(0.92)
    monkeypatch.setenv("PATH", "")
    check_gpu_is_free(0.92)


def test_nothing_is_asked_where_jax_uses_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(tmp_path, monkeypatch, "81559, 0", USERS)
    set_platforms(monkeypatch, "cpu")
    check_gpu_is_free(0.92)
    set_platforms(monkeypatch, None)
    monkeypatch.setattr(gpus, "PLUGINS", ("no_such_plugin",))
    check_gpu_is_free(0.92)
    assert not asked.exists()
