"""No result is lost or doubled, however a run ends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.batch import BatchFileError, ResultFile, Shard
from tests.batch.echo import LINES, EchoEngine, answers, line, read, run, write


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    run(EchoEngine(), source, tmp_path / "whole")
    num_runs = 0
    while True:
        engine = EchoEngine(interrupt_at=6)
        before, num_runs = read(out) if num_runs else [], num_runs + 1
        try:
            summary = run(engine, source, out)
            break
        except KeyboardInterrupt:
            assert not engine.has_unfinished(), "the engine is left empty"
            assert read(out)[: len(before)] == before
    assert num_runs >= 3
    assert summary.num_skipped == len(before)
    assert answers(out) == answers(tmp_path / "whole")
    assert run(EchoEngine(interrupt_at=1), source, out).num_skipped == len(LINES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input and its whole output."""
    folder = tmp_path_factory.mktemp("finished")
    run(EchoEngine(), write(folder / "in", *LINES), folder / "whole")
    return folder


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1))
def test_output_torn_anywhere_is_completed(finished: Path, share: float) -> None:
    data, out = (finished / "whole").read_bytes(), finished / "out"
    out.write_bytes(data[: round(share * len(data))])
    kept = out.read_bytes().count(b"\n")
    assert run(EchoEngine(), finished / "in", out).num_skipped == kept
    assert answers(out) == answers(finished / "whole")


@pytest.mark.parametrize(
    "content", ["my notes", "my notes\n", "7\n", '{"id": "batch_req_1"}\n', json.dumps(line("a")), "{}\n{}\n"]
)
def test_other_files_are_not_written_to(tmp_path: Path, content: str) -> None:
    source, out = write(tmp_path / "in", line("a")), tmp_path / "out"
    out.write_text(content)
    with pytest.raises(BatchFileError, match="out, line 1: not a batch result: b'"):
        run(EchoEngine(), source, out)
    assert out.read_text() == content


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", *LINES), tmp_path / "out"
    first = ResultFile(out)
    with pytest.raises(BatchFileError, match="out: another run is writing to this file"):
        run(EchoEngine(), source, out)
    first.close()
    assert run(EchoEngine(), source, out).num_succeeded == len(LINES) - 2


def test_results_go_to_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(BatchFileError, match=f"{path}: results must go to a file, which a restart can read"):
            ResultFile(path)


CHILD = """
import sys, time
from pathlib import Path
from jaxserve.batch import Shard
from tests.batch.echo import EchoEngine, run

class Slow(EchoEngine):
    def step(self):
        time.sleep(0.002)
        return super().step()

run(Slow(), Path(sys.argv[1]), Path(sys.argv[2]), Shard.parse(sys.argv[3]))
"""


@pytest.mark.parametrize("num_shards", [1, 2])
def test_killed_runs_go_on(tmp_path: Path, num_shards: int) -> None:
    """SIGKILL once results have come. tests/batch/kill_report.py does that 20 times to a model."""
    source, rng = write(tmp_path / "in", *LINES * 7), random.Random(num_shards)
    run(EchoEngine(), source, tmp_path / "whole")
    found = []
    for index in range(num_shards):
        out = tmp_path / f"out-{index}"
        command = [sys.executable, "-c", CHILD, str(source), str(out), f"{index}/{num_shards}"]
        child = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        wanted_bytes = rng.randrange(1, (tmp_path / "whole").stat().st_size // num_shards)
        while child.poll() is None and not (out.exists() and out.stat().st_size >= wanted_bytes):
            time.sleep(0.001)
        child.kill()
        child.wait()
        with out.open("ab") as file:  # what the system may do to a write that was under way
            file.write(b'{"id": "batch_r')
        run(EchoEngine(), source, out, Shard(index, num_shards))
        found += answers(out)
    assert sorted(found) == answers(tmp_path / "whole")
