"""schemathesis over what the HTTP door says of itself: about FUZZ_CASES requests, and no 5xx."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from tests.clients.driver import OPENAI, run
from tests.server.conftest import RunningServer, eventually
from tests.server.test_fuzz import NUM_CASES, tiny_server, unharmed

__all__ = ["eventually", "tiny_server", "unharmed"]  # fixtures
TIMEOUT_SECONDS = 7200


def test_schemathesis(unharmed: RunningServer, tmp_path: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    num_operations = sum(map(len, json.load(opener.open(f"{unharmed.url}/openapi.json"))["paths"].values()))
    said = run(
        OPENAI / "schemathesis", "run", f"{unharmed.url}/openapi.json", "--checks", "not_a_server_error",
        "--phases", "coverage,fuzzing", "--max-examples", str(-(-NUM_CASES // num_operations)),
        "--request-timeout", "30", "--continue-on-failure", "--warnings", "off", "--no-color",
        cwd=tmp_path, timeout_seconds=TIMEOUT_SECONDS,
    )  # fmt: skip
    assert f"{num_operations} selected" in said, said
    print(re.search(r"\d+ generated.*", said)[0])
