"""Everything worth knowing from minutes on a GPU, in one command: python scripts/gpu_check.py --out OUT --budget 470

Stages follow each other, each with a time limit; what they find is in OUT/results.jsonl as it is found, what they say
in OUT/log. A stage that fails or hangs costs the others nothing but its time.

gpu_check.py --report OUT    make docs/results/gpu.md of OUT/results.jsonl, which is kept beside it; of that without OUT
gpu_check.py --wheels FILE   what a machine lacks whose packages FILE lists, as pip freeze does; this one without FILE
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from jaxserve.errors import ConfigError
from jaxserve.evaluation.gpu_check.records import read_records
from jaxserve.evaluation.gpu_check.runner import RESULTS, run_stages
from jaxserve.evaluation.gpu_check.stage import ROOT
from jaxserve.evaluation.gpu_check.stages import STAGES, tiny_stages
from jaxserve.evaluation.gpu_check.wheels import describe_wheels, installed_packages, missing_wheels, read_packages

PAGES = ROOT / "docs" / "results"
IMAGE = PAGES / "gpu-image.txt"
"""What the image is known to have that the page's command is for."""
IMAGE_PYTHON = "3.12"
KEPT = "gpu.jsonl"
THIS = "this"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for all stages together (default: 470)")
    parser.add_argument("--tiny", action="store_true", help="the whole of it on a CPU, with a stage that hangs besides")
    parser.add_argument("--report", nargs="?", const=PAGES, type=Path, metavar="OUT")
    parser.add_argument("--wheels", nargs="?", const=THIS, metavar="FILE")
    args = parser.parse_args()
    try:
        if args.report is not None:
            return report(args.report)
        if args.wheels is not None:
            return wheels(None if args.wheels == THIS else Path(args.wheels))
        return check(args.out, args.budget, tiny=args.tiny)
    except ConfigError as error:
        print(f"gpu_check.py: error: {error}", file=sys.stderr)
        return 2


def check(out: Path | None, budget_seconds: float, *, tiny: bool) -> int:
    if out is None:
        raise ConfigError("out must be given, a folder for the results, got none")
    if not 0 < budget_seconds < float("inf"):
        raise ConfigError(f"budget must be a positive number of seconds, got {budget_seconds:g}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out must be a folder, got {str(out)!r}: {error.strerror}") from error
    if (out / RESULTS).exists():
        raise ConfigError(f"out must have no results yet, got {str(out)!r}")
    signal.signal(signal.SIGTERM, _stop)  # the stage that runs is to end with us
    wheels(None)
    start = time.monotonic()
    passed = run_stages(tiny_stages() if tiny else STAGES, out.resolve(), budget_seconds, tiny=tiny)
    print(f"{time.monotonic() - start:.0f} s; {out / RESULTS} has {len(read_records(out / RESULTS))} records")
    return 0 if passed else 1


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def report(out: Path) -> int:
    found = out / (KEPT if out == PAGES else RESULTS)
    if out != PAGES:
        if not found.is_file():
            raise ConfigError(f"report must be a folder with {RESULTS}, got {str(out)!r}")
        shutil.copyfile(found, PAGES / KEPT)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # predictions need none
    from jaxserve.evaluation.gpu_check.report import render, write_report  # jax

    image = missing_wheels(ROOT, read_packages(IMAGE))
    print(write_report(PAGES, render(read_records(found) if found.is_file() else [], image, IMAGE_PYTHON)))
    return 0


def wheels(packages: Path | None) -> int:
    """Print what is missing."""
    if packages is not None and not packages.is_file():
        raise ConfigError(f"wheels must be a file of packages as pip freeze prints them, got {str(packages)!r}")
    installed = installed_packages() if packages is None else read_packages(packages)
    version = f"{sys.version_info.major}.{sys.version_info.minor}" if packages is None else IMAGE_PYTHON
    print(describe_wheels(missing_wheels(ROOT, installed), version), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
