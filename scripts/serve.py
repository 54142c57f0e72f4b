"""Serve one model over gRPC: python scripts/serve.py --model smollm2-135m --port 50051 --token-budget 256"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.hosts.front_end import FrontEnd
from jaxserve.hosts.group import Group, HostsConfig
from jaxserve.hosts.ranks import exit_code_of, run_follower, set_up_logging
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import build_engines, serve
from jaxserve.server.signals import end_process


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Serve one model over gRPC until SIGTERM, which drains. On several hosts, run it on each."
    )
    engine_config, server_config, hosts_config, _ = parse_config(parser, argv, EngineConfig, ServerConfig, HostsConfig)
    set_up_logging(server_config.log_format)
    return exit_code_of(lambda: run(engine_config, server_config, Group.find(hosts_config, os.environ)))


def run(engine_config: EngineConfig, server_config: ServerConfig, group: Group | None) -> int:
    if group is None:
        build = partial(build_engines, engine_config, server_config.data_parallel)
        return asyncio.run(serve(engine_config, server_config, build))
    if server_config.data_parallel > 1:
        raise ConfigError(f"data_parallel must be 1 on several hosts, got {server_config.data_parallel}")
    if group.rank > 0:
        return run_follower(engine_config, group)
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder:
        return asyncio.run(lead(engine_config, server_config, group, Path(folder)))


async def lead(engine_config: EngineConfig, server_config: ServerConfig, group: Group, folder: Path) -> int:
    return await FrontEnd(engine_config, server_config, group, folder).run()


if __name__ == "__main__":
    # A warm-up that a signal interrupted still compiles in its thread, and nothing waits for it.
    end_process(main())
