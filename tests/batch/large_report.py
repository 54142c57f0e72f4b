"""A batch of 100,000 short requests on a tiny model: ``python -m tests.batch.large_report``.

Says when the first results came and what memory the run had by then and later; then the run is killed half-way, and the
same is said of the one that goes on. The results are counted in the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from tests.batch.tiny_batch import TinyBatch, num_results

SAMPLE_SECONDS = 0.05


def rss_mib(process: subprocess.Popen[bytes]) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Watch:
    """One run from its start; times are since then."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path) -> None:
        self._process, self._out = process, out
        self._started_seconds, self._size = time.monotonic(), out.stat().st_size if out.exists() else 0

    def first_results(self) -> None:
        while not (self._out.exists() and self._out.stat().st_size > self._size):
            assert self._process.poll() is None, "the run has ended without a result"
            time.sleep(SAMPLE_SECONDS)
        print(f"first results after {time.monotonic() - self._started_seconds:.1f} s", flush=True)

    def until(self, num_lines: int, step: int) -> None:
        """Report on the way until so many have results or the run has ended."""
        wanted = num_results(self._out)
        while self._process.poll() is None:
            if (found := num_results(self._out)) >= wanted:
                seconds = time.monotonic() - self._started_seconds
                print(f"{found:7d} results after {seconds:6.1f} s, {rss_mib(self._process):.0f} MiB", flush=True)
                wanted = found + step
            if found >= num_lines:
                return
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    num_lines: int = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        with (folder / "in").open("w") as file:
            for i in range(num_lines):
                body = {"prompt": [5 + i % 80, 5 + i // 80 % 80, 5 + i // 6400], "max_tokens": 1 + i % 3}
                entry = {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/completions", "body": body}
                print(json.dumps(entry), file=file)
        batch = TinyBatch(folder, folder / "in", "--token-budget", "128", "--max-num-seqs", "64")
        for goal in (num_lines // 2, num_lines):
            run = batch.start(out)
            watch = Watch(run, out)
            watch.first_results()
            watch.until(goal, num_lines // 10)
            if goal < num_lines:
                run.kill()
            run.wait()
            print(f"killed with {num_results(out)} results" if goal < num_lines else "ended", flush=True)
        ids = [json.loads(line)["custom_id"] for line in out.open()]
        assert len(ids) == len(set(ids)) == num_lines
        print(f"{num_lines} lines have one result each")


if __name__ == "__main__":
    main()
