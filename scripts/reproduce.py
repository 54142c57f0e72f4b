"""The result table of the Sarathi-Serve paper beside the same experiments in simulation; ~10 minutes on one core.

Writes docs/results/paper.md and, beside it, paper.json with the raw numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxserve.models.presets import PRESETS
from jaxserve.models.registry import read_config
from jaxserve.simulator.paper import SETUPS, Reproduction
from jaxserve.simulator.reproduce import reproduce

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=RESULTS / "paper.md", help="where to write the page")
    parser.add_argument("--time-share", type=float, default=1.0, help="of each trial's duration, for a quick look")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the capacities, relative")
    args = parser.parse_args()
    models = {setup.model: read_config(PRESETS[setup.model], setup.model) for setup in SETUPS}
    run = Reproduction(models, time_share=args.time_share, tolerance=args.tolerance)
    print(reproduce(run, args.page))


if __name__ == "__main__":
    main()
