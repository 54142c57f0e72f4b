"""Run an OpenAI batch file offline: python scripts/batch.py requests.jsonl results.jsonl --token-budget 256"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxserve.batch_file import BatchFileError, BatchRun, BatchSummary, ResultFile
from jaxserve.config import ConfigError, EngineConfig, parse_config
from jaxserve.engine.engine import Engine
from jaxserve.models.config import ModelError


def run(source: Path, destination: Path, config: EngineConfig) -> BatchSummary:
    # The files first: a mistyped path should not cost a model's start.
    with (
        source.open("rb") as lines,
        contextlib.closing(ResultFile(destination)) as results,
        contextlib.closing(Engine(config)) as engine,
    ):
        return BatchRun(engine, lines, results).run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Give every line of INPUT a line of OUTPUT. After an interruption, run it again: it goes on there."
    )
    parser.add_argument("input", type=Path, help="JSONL of {custom_id, method, url, body}, as of OpenAI's batches")
    parser.add_argument("output", type=Path, help="JSONL of {id, custom_id, response, error}, appended to")
    config, args = parse_config(parser, argv, EngineConfig)
    try:
        summary = run(args.input, args.output, config)
    except (OSError, BatchFileError, ConfigError, ModelError) as error:
        print(f"batch.py: error: {error}", file=sys.stderr)
        return 2
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
