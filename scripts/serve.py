"""Serve one model over gRPC: python scripts/serve.py --model smollm2-135m --port 50051 --token-budget 256"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

from jaxserve.config import ConfigError, EngineConfig, ServerConfig, parse_config
from jaxserve.models.config import ModelError
from jaxserve.server.grpc_server import serve


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve one model over gRPC until SIGTERM, which drains.")
    engine_config, server_config, _ = parse_config(parser, argv, EngineConfig, ServerConfig)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        asyncio.run(serve(engine_config, server_config))
    except (ConfigError, ModelError) as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A warm-up that a signal interrupted still compiles in its thread. Nothing waits for it, and XLA must not be torn
    # down under it, so the process ends without Python's clean-up.
    os._exit(exit_code)
