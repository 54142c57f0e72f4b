"""jaxserve beside the peers that `make peers` installed: the same model, prompts and lengths, in turns.

compare.py --contestants jaxserve:float32 vllm:float32 --rounds 5 --output compare.json --plot compare.png

Every contestant is a process of its own, idle unless it is its turn. Offline all requests come at once, for throughput;
online they come at a rate, for TTFT and TBT. About ten minutes on two quiet cores for all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxserve.cli import parse_config
from jaxserve.errors import ConfigError, ModelError
from jaxserve.evaluation.compare import CompareConfig, compare, rows, to_json
from jaxserve.evaluation.contestants import PROGRAMS, Contestant
from jaxserve.evaluation.report import check_can_report, processor, text_table

ROOT = Path(__file__).resolve().parents[1]
ALL = [f"{name}:{dtype}" for name, program in PROGRAMS.items() for dtype in program.dtypes]


def installed(texts: Sequence[str], environments: Path) -> dict[Contestant, list[str]]:
    """The commands of those contestants that can run; says which cannot. Raises ConfigError."""
    commands = {}
    for contestant in dict.fromkeys(map(Contestant.parse, texts)):
        command = contestant.command(ROOT / "scripts" / "peers", environments)
        if command is None:
            print(f"{contestant} is left out: {contestant.program} is not in {environments}, make peers installs it")
        else:
            commands[contestant] = command
    if not commands:
        raise ConfigError(f"contestants: none of {', '.join(texts)} is installed in {environments}")
    return commands


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=ALL, metavar="PROGRAM[:DTYPE]", help=", ".join(ALL))
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="the peers' environments")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write everything measured")
    parser.add_argument("--plot", metavar="FILE.png", help="draw throughput and latency")
    config, args = parse_config(parser, argv, CompareConfig)
    try:
        if args.plot:
            check_can_report(args.plot)
        outcomes = compare(
            installed(args.contestants, args.peers.resolve()), config, say=lambda line: print(line, flush=True)
        )
    except (ConfigError, ModelError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{processor()}\n{text_table(rows(outcomes))}")
    for outcome in outcomes:
        if outcome.failure is not None:
            print(f"{outcome.name} failed, {outcome.failure}")
    if args.output:
        args.output.write_text(json.dumps(to_json(outcomes, config), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from jaxserve.evaluation.figures import comparison  # matplotlib is an extra

        comparison(args.plot, outcomes)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
