from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from jaxserve.scheduler.step_time import Profile, RelativeError, StepTimeModel
from scripts import simulate

SMALL = ("--num-requests", "8", "--max-total-tokens", "512", "--max-model-len", "512")


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate.py", *args])
    simulate.main()


def test_one_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--model", "yi-34b", "--tp", "2", "--rate", "2", *SMALL)
    assert "x real time" in capsys.readouterr().out


def test_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--p99-tbt", "0.1", "--sweep", "budgets", "--budgets", "256", "512", "--high", "0.2",
        "--serve", "1", *SMALL)  # fmt: skip
    out = capsys.readouterr().out
    assert "budget 256" in out
    assert "replicas for 1/s" in out


def test_bubbles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--pp", "2", "--rate", "4", "--bubbles", *SMALL)
    head, *rows = capsys.readouterr().out.splitlines()
    assert "idle rows" in head
    assert [row.split()[0] for row in rows] == ["sarathi", "prefill_first", "orca"]
    run(monkeypatch, "--pp", "2", "--rate", "4", *SMALL, "--bubbles", "hybrid_only")
    assert "hybrid_only" in capsys.readouterr().out


def test_measured_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A step of 0.25 s whatever is in it: so is the time between tokens."""
    step_time = StepTimeModel({16: 0.25, 512: 0.25}, 0.0, 0.0)
    profile = Profile("mistral-7b", "bfloat16", "GPU", "2026-11-23", RelativeError(0.0, 0.0), step_time)
    (tmp_path / "profile.json").write_text(profile.to_json())
    run(monkeypatch, "--profile", str(tmp_path / "profile.json"), *SMALL)
    assert "0.2500     0.2500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "gpt-5"), "model must be one of mistral-7b, .* or a folder with a config.json"),
        (("--device", "tpu"), "device must be one of a100-80g"),
        (("--sweep", "shapes"), "sweep, serve and plot need an objective: give --p99-tbt"),
        (("--profile", "nowhere.json"), "profile: cannot read 'nowhere.json'"),
        (("--bubbles",), "pipeline must be at least 2 for its stages to wait, got 1"),
        (("--pp", "2", "--p99-tbt", "0.2", "--bubbles"), "bubbles are of one rate, .* give --rate, not --p99-tbt"),
        (("--pp", "2", "--bubbles", "lifo"), "argument --bubbles: invalid choice: 'lifo'"),
        (("--pp", "2", "--bubbles", "adaptive"), "argument --bubbles: invalid choice: 'adaptive'"),
        (("--model", "falcon-180b"), "weights of 33.* GiB a device leave no room"),
    ],
)
def test_what_cannot_work_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *args, *SMALL)
    assert re.search(message, capsys.readouterr().err)
