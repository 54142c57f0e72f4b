"""Run an OpenAI batch file offline: python scripts/batch.py requests.jsonl results.jsonl --token-budget 256"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxserve.batch_file import BatchRun, BatchSummary, check_models, open_source
from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import ConfigError, ModelError
from jaxserve.result_file import BatchFileError, ResultFile


def run(source: Path, destination: Path, config: EngineConfig, served_model_names: Sequence[str]) -> BatchSummary:
    # The files first: a mistyped path should not cost a model's start.
    with open_source(source) as lines, contextlib.closing(ResultFile(destination)) as results:
        check_models(lines, served_model_names)
        with contextlib.closing(Engine(config)) as engine:
            return BatchRun(engine, lines, results, served_model_names=served_model_names).run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Give every line of INPUT a line of OUTPUT. After an interruption, run it again: it goes on there."
    )
    parser.add_argument(
        "input", type=Path, help="JSONL of {custom_id, method, url, body}, as of OpenAI's batches; or -"
    )
    parser.add_argument("output", type=Path, help="JSONL of {id, custom_id, response, error}, appended to")
    parser.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="what requests may call the model, may be repeated; results have the first (default: as --model has it)",
    )
    config, args = parse_config(parser, argv, EngineConfig)
    try:
        summary = run(args.input, args.output, config, getattr(args, "served_model_name", (config.model,)))
    except (OSError, BatchFileError, ConfigError, ModelError) as error:
        print(f"batch.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("batch.py: interrupted; run it again to go on", file=sys.stderr)
        return 130
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
