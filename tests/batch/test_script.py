"""scripts/batch.py."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO

import pytest

from jaxserve.batch import ResultFile
from tests.batch.echo import LINES, EchoEngine, line, read, write


@contextlib.contextmanager
def pipe_of(path: Path) -> Iterator[IO[bytes]]:
    """The file's content through a pipe."""
    reading, writing = os.pipe()

    def fill() -> None:
        with os.fdopen(writing, "wb") as end:
            end.write(path.read_bytes())

    with os.fdopen(reading, "rb") as source, ThreadPoolExecutor(1) as pool:
        pool.submit(fill)
        yield source


@pytest.fixture
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "batch.py"
    spec = importlib.util.spec_from_file_location("batch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Engine", EchoEngine)
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    assert script.main([str(source), str(out)]) == 0
    assert len(read(out)) == len(LINES)
    assert capsys.readouterr().out.startswith("32 requests, 2 errors, 0 skipped in ")


def test_script_with_a_pipe_and_a_name(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Engine", EchoEngine)
    source = write(tmp_path / "in", *(line(str(i), prompt="hi", model="my-model") for i in range(9)))
    for name in ("-", "/dev/stdin"):
        with pipe_of(source) as pipe:
            monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=pipe))
            path = name if name == "-" else f"/dev/fd/{pipe.fileno()}"
            assert script.main([path, str(tmp_path / "out"), "--served-model-name", "my-model"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("9 requests, 0 errors, 0 skipped in ")
    assert second.startswith("0 requests, 0 errors, 9 skipped in ")


def test_an_interrupted_script_says_so(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Engine", partial(EchoEngine, interrupt_at=6))
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    assert script.main([str(source), str(out)]) == 130
    assert "batch.py: interrupted; run it again to go on" in capsys.readouterr().err
    done = len(read(out))
    assert 0 < done < len(LINES)
    monkeypatch.setattr(script, "Engine", EchoEngine)
    assert script.main([str(source), str(out)]) == 0
    assert f"{done} skipped" in capsys.readouterr().out


def test_script_fails_before_a_model_is_loaded(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    assert script.main([str(tmp_path / "none"), str(out)]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert script.main([str(source), str(source)]) == 2
    assert "not a batch result" in capsys.readouterr().err
    other = write(tmp_path / "other", line("a", prompt="hi", model="gpt-4o"), line("b", prompt="hi", model="o1"))
    assert script.main([str(other), str(out)]) == 2
    assert "model must be 'smollm2-135m', which is served here, but every request has another, such as 'o1'" in (
        capsys.readouterr().err
    )
    held = ResultFile(out)
    assert script.main([str(source), str(out)]) == 2
    assert "out: another run is writing to this file" in capsys.readouterr().err
    held.close()
    assert script.main([str(source), str(out), "--model", "no-such-model"]) == 2
    assert "unknown model 'no-such-model'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        script.main([str(source), str(out), "--token-budget", "0"])
    assert caught.value.code == 2
    assert "token_budget must be an integer of at least 1, got 0" in capsys.readouterr().err


def test_script_with_shards_and_order(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "Engine", EchoEngine)
    first, second = write(tmp_path / "first", *LINES[:20]), write(tmp_path / "second", *LINES[20:])
    for index in range(2):
        flags = ["--shard", f"{index}/2", "--order", "input", "--first", "prefix"]
        assert script.main([str(first), str(second), str(tmp_path / f"out-{index}"), *flags]) == 0
        numbers = [int(result["id"].removeprefix("batch_req_")) for result in read(tmp_path / f"out-{index}")]
        assert numbers == list(range(1 + index, len(LINES) + 1, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "2/2"], "argument --shard: shard must be i/N, from 0/N to N-1/N, got '2/2'"),
        (
            ["--endpoint", "http://a", "--token-budget", "64"],
            "--token-budget is an engine's, and --endpoint sends to a ",
        ),
        (["--first", "shortest"], "argument --first: invalid choice: 'shortest'"),
    ],
)
def test_wrong_flags(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main([str(tmp_path / "in"), str(tmp_path / "out"), *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_script_with_an_endpoint(tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", *LINES)
    assert script.main([str(source), str(tmp_path / "out"), "--endpoint", "localhost"]) == 2
    assert (
        "endpoint must be a URL such as http://127.0.0.1:8000 or grpc://127.0.0.1:50051, got 'localhost'"
        in capsys.readouterr().err
    )
