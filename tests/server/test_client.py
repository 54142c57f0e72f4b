"""The client package and scripts/generate.py, against the fake engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GENERATE = Path(__file__).parents[2] / "scripts" / "generate.py"


def generate(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GENERATE), *args], capture_output=True, text=True, timeout=60)


def test_the_client_loads_no_jax():
    code = "import sys, jaxserve.server.client; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_generate_script_streams_text_and_reports_times(server):
    done = generate("hello", "--max-tokens", "5", "--target", server.target)
    assert (done.returncode, done.stdout) == (0, "xxxxx\n")
    assert "TTFT" in done.stderr
    assert "TBT p50" in done.stderr


def test_generate_script_tells_what_is_wrong(server):
    done = generate("hello", "--max-tokens", "0", "--target", server.target)
    assert done.returncode == 1
    assert "INVALID_ARGUMENT: max_tokens must be an integer in [1, 2147483647], got 0" in done.stderr


def test_generate_script_without_a_server():
    done = generate("hello", "--target", "127.0.0.1:1")
    assert done.returncode == 1
    assert "UNAVAILABLE at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
