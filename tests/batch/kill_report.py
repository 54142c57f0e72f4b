"""kill -9 of scripts/batch.py at random moments, whole and in shards: ``python -m tests.batch.kill_report --kills 20``.

A batch of 200 lines of all kinds on a tiny model is run once to its end, then again and again, each time killed; after
``--kills`` of these a last run goes to the end. Each custom_id must have one result, equal to the first run's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.batch.echo import answers, line, read, write
from tests.batch.tiny_batch import TinyBatch, num_results

NUM_LINES = 200


def lines(rng: random.Random) -> list[dict[str, Any] | str]:
    made: list[dict[str, Any] | str] = []
    for number in range(NUM_LINES):
        prompt = [rng.randrange(5, 90) for _ in range(rng.randrange(1, 20))]
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": rng.randrange(1, 40),
            "ignore_eos": True,
            "seed": number,
        }
        kinds = [
            {"temperature": 0},
            {"n": 3},
            {"logprobs": 2},
            {"echo": True, "max_tokens": 0, "logprobs": 1},
            {"n": -1},
        ]
        made.append(line(str(number), **body | kinds[number % 4 if number % 40 else 4]))
    return made


def same(mine: Any, wanted: Any) -> bool:
    """Equal, but that sums of floats, of log-probabilities, may have been made in another order."""
    if isinstance(wanted, dict):
        return list(mine) == list(wanted) and all(same(mine[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(mine) == len(wanted) and all(map(same, mine, wanted))
    return math.isclose(mine, wanted, abs_tol=1e-4) if isinstance(wanted, float) else bool(mine == wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = ("--token-budget", "16", "--max-num-seqs", "4", "--num-blocks", "40")
        batch = TinyBatch(folder, write(folder / "in", *lines(rng)), *sizes)
        started_seconds = time.monotonic()
        assert batch.start(folder / "whole").wait() == 0
        first_seconds = time.monotonic() - started_seconds
        print(f"{NUM_LINES} lines, uninterrupted: {first_seconds:.1f} s")
        for count in args.shards:
            found, kept = list[str](), []
            for index in range(count):
                out, shard = folder / f"out-{index}-{count}", f"{index}/{count}"
                for number in range(args.kills // count):
                    child = batch.start(out, "--shard", shard)
                    # While it serves, mostly: one in five dies as it starts.
                    if number % 5 == 4:
                        time.sleep(rng.random() * first_seconds)
                    wanted = num_results(out) + rng.randrange(NUM_LINES // (args.kills + 1))
                    while number % 5 != 4 and child.poll() is None and num_results(out) <= wanted:
                        time.sleep(0.001)
                    child.kill()
                    child.wait()
                    kept.append(num_results(out))
                assert batch.start(out, "--shard", shard).wait() == 0
                found += answers(out)
            ids = Counter(json.loads(one)["custom_id"] for one in found)
            for mine, wanted in zip(sorted(found), answers(folder / "whole"), strict=True):
                assert same(json.loads(mine), json.loads(wanted)), f"{mine} is not {wanted}"
            assert len(ids) == NUM_LINES
            assert set(ids.values()) == {1}
            print(
                f"{count} shard(s), {len(kept)} kills, with {kept} results by then: each once, equal to the first run's"
            )
        num_errors = sum(result["error"] is not None for result in read(folder / "whole"))
        print(f"of the results {num_errors} are errors")


if __name__ == "__main__":
    main()
