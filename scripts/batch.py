"""Run OpenAI batch files offline: batch.py requests.jsonl results.jsonl --token-budget 256

The results are lines of JSON: pandas.read_json("results.jsonl", lines=True) reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from jaxserve.batch import (
    FIRST,
    BatchFileError,
    BatchInput,
    BatchRun,
    BatchSummary,
    EndpointServer,
    EngineServer,
    OfflineConfig,
    ResultFile,
    Shard,
)
from jaxserve.batch.answer import BatchServer
from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import ConfigError, ModelError


def run(args: argparse.Namespace, config: EngineConfig) -> BatchSummary:
    # The files first: a mistyped path should not cost a model's start.
    with BatchInput(args.inputs, args.shard) as source, ResultFile(args.output) as results:
        with _server(args, config, source) as server:
            summary = BatchRun(server, source, results).run()
        if args.order == "input":
            results.sort()
        return summary


@contextmanager
def _server(args: argparse.Namespace, config: EngineConfig, source: BatchInput) -> Iterator[BatchServer]:
    if args.endpoint is not None:
        yield EndpointServer(args.endpoint, concurrency=args.concurrency, api_key=os.environ.get("JAXSERVE_API_KEY"))
        return
    names = args.served_model_name or (config.model,)
    source.check_models(names)
    with closing(Engine(config)) as engine:
        yield EngineServer(engine, names, args.first)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Give every line of INPUT a line of OUTPUT. After an interruption, run it again: it goes on there."
    )
    made.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="JSONL of {custom_id, method, url, body}, as of OpenAI's batches, also gzip or zstd; or -",
    )
    made.add_argument(
        "output", type=Path, metavar="OUTPUT", help="JSONL of {id, custom_id, response, error}, appended to"
    )
    made.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what requests may call the model, may be repeated; results have the first (default: as --model has it)",
    )
    made.add_argument(
        "--shard", type=_shard, default=Shard(), metavar="i/N", help="every N-th line from the i-th on, counted from 0"
    )
    made.add_argument(
        "--order",
        choices=("completion", "input"),
        default="completion",
        help="of the results; input: once all lines have one, they are put in the order of the lines",
    )
    made.add_argument(
        "--first",
        choices=tuple(FIRST),
        default="input",
        help="which of the next lines are served first (default: input)",
    )
    made.add_argument(
        "--endpoint",
        metavar="URL",
        help="send to a server instead of an engine here: http://127.0.0.1:8000, to any that speaks OpenAI's API, or "
        "grpc://127.0.0.1:50051, to jaxserve's; its key is the variable JAXSERVE_API_KEY",
    )
    made.add_argument("--concurrency", type=int, default=64, help="lines that --endpoint gets at once (default: 64)")
    return made


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    config, args = parse_config(arguments, argv, OfflineConfig)
    of_engine = [f.name for f in dataclasses.fields(OfflineConfig) if f.name in args]
    if args.endpoint is not None and of_engine:
        arguments.error(f"--{of_engine[0].replace('_', '-')} is an engine's, and --endpoint sends to a server's")
    try:
        summary = run(args, config)
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
