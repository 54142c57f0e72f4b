"""scripts/gpu_check.py: the whole of it on a CPU, and what becomes of stages and records when things go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.evaluation.gpu_check.records import Recorder, read_records
from jaxserve.evaluation.gpu_check.runner import LOG, NO_GRAPHS, RESULTS, run_stages
from jaxserve.evaluation.gpu_check.stage import Stage
from jaxserve.evaluation.gpu_check.stages import HANGING, STAGES, tiny_stages

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
LIGHT = Stage("light", "archive", 1, 60)
BROKEN = Stage("broken", "no_such_module", 1, 60)


def statuses(out: Path) -> dict[str, str]:
    return {record["stage"]: record["status"] for record in read_records(out / RESULTS) if record["kind"] == "stage"}


@pytest.mark.timeout(1300)
def test_the_whole_of_it_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(tmp_path / "out"), "--budget", "1200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1250)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / LOG).read_text()[-3000:]
    assert "This machine lacks no package." in done.stdout
    expected = {stage.name: "passed" for stage in tiny_stages()} | {"hanging": "timed out"}
    assert statuses(tmp_path / "out") == expected
    records = read_records(tmp_path / "out" / RESULTS)
    assert all(record["equal"] for record in records if record["kind"] == "graphs")
    assert all(len(record["errors"]) == 3 and record["right"] for record in records if record["kind"] == "correctness")
    assert [record["window"] for record in records if record["kind"] == "attention"] == [None, 64]
    products = [record for record in records if record["kind"] == "product"]
    assert [(record["pair"], record["rows"], record["product"]) for record in products] == [
        (pair, rows, kind) for pair in ("MLP", "attention") for rows in (3, 300) for kind in ("bfloat16", "codes")
    ]
    assert all(record["seconds"]["median"] > 0 for record in products)
    steps = {record["step"]: record for record in records if record["kind"] == "step"}
    assert steps["decode 1 x 1024"]["seconds"]["median"] > 0
    assert steps["decode 128 x 1024"]["left_out"].startswith("needs max_num_seqs of 128, got 32")
    assert [record["policy"] for record in records if record["kind"] == "server"] == ["sarathi", "prefill_first"]
    assert all(record["tbt_p99_seconds"] > 0 for record in records if record["kind"] == "server")
    kinds = {record["kind"] for record in records}
    assert kinds >= {"machine", "ceilings", "golden", "startup", "under_load", "counters", "archive"}


def test_a_stage_that_fails_or_hangs_costs_the_next_ones_nothing(tmp_path: Path) -> None:
    assert not run_stages([BROKEN, HANGING, LIGHT], tmp_path, 60)
    assert statuses(tmp_path) == {"broken": "failed with exit code 1", "hanging": "timed out", "light": "passed"}
    (message,) = (record["message"] for record in read_records(tmp_path / RESULTS) if record["kind"] == "failure")
    assert "no_such_module" in message
    assert "=== light" in (tmp_path / LOG).read_text()


def test_what_should_hang_and_does_not_is_a_failure(tmp_path: Path) -> None:
    assert not run_stages([replace(LIGHT, hangs=True)], tmp_path, 60)


def test_the_budget_skips_what_no_longer_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = replace(LIGHT, name="long", least_seconds=100)
    assert run_stages([long, LIGHT], tmp_path, 30)
    skipped, *_, ended = (record for record in read_records(tmp_path / RESULTS) if record["kind"] == "stage")
    assert (skipped["stage"], skipped["status"]) == ("long", "skipped")
    assert ended["status"] == "passed"
    assert ended["limit_seconds"] <= 30
    assert "long         skipped: 100 s needed, 20 left" in capsys.readouterr().out


def test_the_usual_budget_begins_every_stage_but_the_extra_ones() -> None:
    """Even where each takes half of its limit."""
    left = 470.0
    for stage in STAGES:
        if stage.name not in ("tuned-steps", "no-split-k-steps"):
            assert stage.least_seconds < min(stage.limit_seconds, left), stage.name
            left -= stage.limit_seconds / 2


def test_without_graphs_where_graphs_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_max_hlo_modules=1")
    shows = "import os, sys; print(os.environ['XLA_FLAGS'])"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$3" = broken ] && exit 1\nexec {sys.executable} -c "{shows}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    run_stages([LIGHT, replace(BROKEN, needs_graphs=True), LIGHT], tmp_path, 60)
    assert (tmp_path / LOG).read_text().splitlines() == [
        "=== light", "--xla_dump_max_hlo_modules=1", "=== broken", "=== light",
        f"--xla_dump_max_hlo_modules=1 {NO_GRAPHS}",
    ]  # fmt: skip
    graphs = [record["graphs"] for record in read_records(tmp_path / RESULTS) if record["kind"] == "stage"]
    assert graphs == [True, True, False]


ADDS_AND_DIES = """
import os, signal, sys
from pathlib import Path
from jaxserve.evaluation.gpu_check.records import Recorder
Recorder(Path(sys.argv[1]), "stage").add("found", value=1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_records_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    assert subprocess.run([sys.executable, "-c", ADDS_AND_DIES, str(path)]).returncode == -signal.SIGKILL
    with path.open("a") as file:
        file.write('{"time": 1, "stage": "st')  # so much of the next one
    (record,) = read_records(path)
    assert (record["stage"], record["kind"], record["value"]) == ("stage", "found", 1)
    with pytest.raises(ValueError, match="Out of range float"):
        Recorder(path, "stage").add("found", value=float("nan"))


def test_a_check_that_is_ended_ends_its_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check = subprocess.Popen([sys.executable, str(SCRIPT), "--tiny", "--out", str(out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not processes_of(out) - {check.pid}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    check.terminate()
    assert check.wait(60) == 128 + signal.SIGTERM
    while processes_of(out):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(out: Path) -> set[int]:
    """Whose command lines have the folder."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(out) in command:
            found.add(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "out must be given, a folder for the results, got none"),
        (["--out", "{tmp}/new", "--budget", "0"], "budget must be a positive number of seconds, got 0"),
        (["--out", "{tmp}/new", "--budget", "inf"], "budget must be a positive number of seconds, got inf"),
        (["--out", "{tmp}/file"], "out must be a folder, got '{tmp}/file': File exists"),
        (["--out", "{tmp}/used"], "out must have no results yet, got '{tmp}/used'"),
        (["--report", "{tmp}"], "report must be a folder with results.jsonl, got '{tmp}'"),
        (["--wheels", "{tmp}/none"], "wheels must be a file of packages as pip freeze prints them, got '{tmp}/none'"),
    ],
)
def test_wrong_flags_are_clear_errors(args: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / RESULTS).touch()
    given = [arg.format(tmp=tmp_path) for arg in args]
    done = subprocess.run([sys.executable, str(SCRIPT), *given], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"gpu_check.py: error: {message.format(tmp=tmp_path)}\n"
