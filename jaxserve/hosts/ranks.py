"""The processes that share a model, each on a host of its own: rank 0 leads and serves, the others follow."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, ModelError
from jaxserve.hosts.group import Group
from jaxserve.server.config import ServerConfig
from jaxserve.server.serve import build_engines, serve
from jaxserve.server.signals import drain_on_signal, end_process

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

logger = logging.getLogger(__name__)

LOST, WRONG = 1, 2
"""Exit codes: the group has lost a process and can only be started again; a configuration that cannot work."""


def set_up_logging(log_format: str) -> None:
    """``log_format``: of LOG_FORMATS."""
    logging.basicConfig(level=logging.INFO, handlers=[log_handler(log_format)])
    logging.getLogger("jax").setLevel(logging.WARNING)


def log_handler(log_format: str) -> logging.StreamHandler[TextIO]:
    """Writes lines to stderr, or JSON objects, in which a record's extra fields are fields."""
    handler = logging.StreamHandler()
    if log_format == "text":
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    else:
        # Imported late: nobody else needs it.
        from pythonjsonlogger.json import JsonFormatter

        names = {"levelname": "level", "name": "logger"}
        handler.setFormatter(JsonFormatter([*names, "message"], rename_fields=names, timestamp="time"))
    return handler


def exit_code_of(run: Callable[[], int]) -> int:
    """What ``run`` returns; configurations that cannot work are told in one line."""
    try:
        return run()
    except (ConfigError, ModelError) as error:
        print(f"jaxserve: error: {error}", file=sys.stderr)
        return WRONG


def run_leader(engine_config: EngineConfig, server_config: ServerConfig, group: Group, socket: Path) -> NoReturn:
    """The process of rank 0: serves on ``socket`` what the whole group computes. Ends with its parent."""
    set_up_logging(server_config.log_format)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def build() -> list[Engine]:
        from jaxserve.hosts.steps import Followers, Leader

        drain = partial(os.kill, os.getpid(), signal.SIGTERM)
        followers = Followers(group.size - 1, group.step_address, _lost, drain, group.trust)
        group.join()
        return build_engines(engine_config, make_runner=partial(Leader, followers))

    end_process(exit_code_of(lambda: asyncio.run(serve(engine_config, server_config, build, socket))))


def run_follower(engine_config: EngineConfig, group: Group) -> int:
    """What the process of any other rank runs; returns its exit code. Raises ConfigError and ModelError.

    SIGTERM drains the group, as clusters send it to all hosts at once; so does SIGINT, which then ends the process.
    """
    group.join()
    from jaxserve.engine.runner import ModelRunner, prepare
    from jaxserve.hosts.steps import Follower
    from jaxserve.sharding.mesh import make_mesh

    checkpoint, config = prepare(engine_config)
    mesh = make_mesh(config.tensor_parallel, config.pipeline_parallel)
    runner = ModelRunner(config, checkpoint, mesh, show_progress=True)
    follower = Follower(runner, group.rank, group.step_address, _lost, group.trust)
    drain_on_signal(follower.drain)
    logger.info("host %d of %d follows %s", group.rank, group.size, group.leader)
    follower.run()
    return 0


def _lost(message: str) -> NoReturn:
    logger.critical("%s; this process ends, so that the group can be started again", message)
    end_process(LOST)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    end_process(LOST)
