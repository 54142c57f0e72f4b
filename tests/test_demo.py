"""README's first command, in the environment that its second one leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu_packages import OF_THE_TESTS

DEMO = Path(__file__).parents[1] / "scripts" / "demo.py"


def test_the_demo_says_only_what_concerns_its_user() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_TESTS}
    done = subprocess.run([sys.executable, DEMO], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stdout.endswith("The server has shut down cleanly.\n")
    assert "Traceback" not in done.stdout + done.stderr
    assert "rror" not in done.stderr
