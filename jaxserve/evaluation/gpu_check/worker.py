"""One stage as a process: python -m jaxserve.evaluation.gpu_check.worker NAME MODULE --out DIR --seconds 60"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from jaxserve.evaluation.gpu_check.records import Recorder
from jaxserve.evaluation.gpu_check.runner import RESULTS
from jaxserve.evaluation.gpu_check.stage import Context, StageFailed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the stage, for its records")
    parser.add_argument("module", help="of this package")
    parser.add_argument("arguments", nargs="*", help="of the stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    records = Recorder(args.out / RESULTS, args.name)
    deadline = time.monotonic() + args.seconds
    context = Context(args.name, args.out, records, deadline, args.tiny, args.arguments)
    try:
        importlib.import_module(f"jaxserve.evaluation.gpu_check.{args.module}").run(context)
    except StageFailed as failure:
        print(f"{args.name}: {failure}", file=sys.stderr)
        return 1
    except BaseException as failure:
        records.add("failure", message=f"{type(failure).__name__}: {failure}"[:1000])
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
