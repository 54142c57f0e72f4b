"""scripts/bench.py as a command, as far as it needs no engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench.py"


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH), *args], capture_output=True, text=True, timeout=120)


def test_serve_against_a_running_server(server, tmp_path):
    workload = ["--lengths", "fixed", "--num-prompt-tokens", "8", "--num-output-tokens", "4"]
    report = tmp_path / "load.html"
    done = bench("serve", "--target", server.target, *workload, "--num-requests", "5", "--rate", "50",
                 "--tbt-seconds", "30", "--report", str(report))  # fmt: skip
    assert done.returncode == 0, done.stderr
    processor, names, numbers = done.stdout.splitlines()[:3]
    assert "native kernels" in processor
    assert names.startswith("policy")
    assert numbers.split()[:4] == [server.target, "50", "5", "0"]
    assert report.read_text().startswith("<!doctype html>")
    raw = json.loads(report.with_suffix(".json").read_text())
    assert raw["settings"]["workload"]["num_prompt_tokens"] == 8
    assert raw["series"][0]["run"]["summary"]["goodput_requests_per_second"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["capacity", "--low", "5", "--high", "1"], "low must be above 0 and below high, got 5 and 1"),
        (["serve", "--report", "/no/such/folder/x.html"], "report must be in a folder that exists"),
        (["serve", "--metrics-url", "http://x"], "metrics-url is that of --target, got 'http://x' without"),
        (["step", "--pipeline-parallel", "2"], "pipeline-parallel must be 1, steps are timed one at a time, got 2"),
        (["stalls"], "invalid choice: 'stalls'"),
    ],
)
def test_wrong_flags_are_clear_errors(args, message):
    done = bench(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
