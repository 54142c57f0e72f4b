"""What an engine is made of: from a configuration to loaded, compiled and warm parts."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine.profiling import Profiler, largest_budget, read_profile
from jaxserve.engine.runner import ModelRunner, prepare
from jaxserve.engine.startup import StartupTimes, timed
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import generation, hf_tokenizer
from jaxserve.models.loading.files import read_text
from jaxserve.models.loading.hub import resolve
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Pace, Scheduler
from jaxserve.scheduler.step_time import Profile
from jaxserve.sharding.mesh import make_mesh
from jaxserve.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineParts:
    """Of one engine, ready to serve."""

    config: ResolvedConfig
    """With nothing left open."""
    model_config: ModelConfig
    """Of the undivided model."""
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, Any]
    """The model's own, for fields that a request leaves open."""
    runner: ModelRunner
    scheduler: Scheduler
    startup: StartupTimes


def build(
    config: EngineConfig,
    mesh: Mesh | None,
    make_runner: Callable[..., ModelRunner],
    *,
    show_progress: bool,
    imports_seconds: float,
) -> EngineParts:
    """Load, compile and warm up. Raises ConfigError and ModelError; for the arguments see Engine."""
    started_seconds = time.monotonic()
    checkpoint, resolved = prepare(config)
    stored = read_profile(config.profile, resolved) if config.profile is not None else None
    tokenizer = hf_tokenizer.load(resolve(config.tokenizer)) if config.tokenizer else checkpoint.tokenizer()
    if config.chat_template is not None:
        tokenizer.set_chat_template(read_text(Path(config.chat_template)))
    eos = checkpoint.eos_token_ids(tokenizer)
    defaults = checkpoint.sampling_defaults if config.generation_config == "auto" else {}
    _log_sampling(defaults)
    mesh = mesh or make_mesh(config.tensor_parallel, config.pipeline_parallel)
    runner = make_runner(resolved, checkpoint, mesh, show_progress=show_progress)
    _, warm_up_seconds = timed(runner.warm_up) if config.warmup else (None, 0.0)
    pace = None
    if config.needs_step_times:
        pace, resolved = _settle_pace(runner, resolved, stored, auto=config.token_budget == "auto")
    scheduler = config.policy(resolved.limits(runner.num_blocks, window=checkpoint.config.window, pace=pace))
    runner.prepare_rare()
    startup = StartupTimes(
        imports_seconds,
        runner.weights_seconds,
        runner.compile_seconds,
        runner.loading_seconds,
        warm_up_seconds,
        imports_seconds + time.monotonic() - started_seconds,
    )
    logger.info("%s", startup)
    if not config.warmup:
        logger.warning("no warm-up: steps stall while programs compile at their first use; for development only")
    return EngineParts(resolved, checkpoint.config, tokenizer, eos, defaults, runner, scheduler, startup)


def _log_sampling(defaults: Mapping[str, Any]) -> None:
    effective = SamplingParams(**defaults)
    logger.info(
        "sampling defaults: %s; of the model: %s",
        ", ".join(f"{name} {getattr(effective, name)}" for name in generation.FIELDS),
        ", ".join(defaults) or "none",
    )


def _settle_pace(
    runner: ModelRunner, config: ResolvedConfig, stored: Profile | None, *, auto: bool
) -> tuple[Pace, ResolvedConfig]:
    """The objective, and step times from the stored profile or measured now; an ``auto`` budget goes by them.

    Every bucket that could be the budget has been compiled; those above the one chosen go unused.
    """
    slo_tbt_seconds, profiler = config.slo_tbt_seconds, Profiler(runner)
    assert slo_tbt_seconds is not None, "checked by the configuration"
    profile = stored or profiler.profile(stop_seconds=slo_tbt_seconds)[0]
    if auto:
        budget = largest_budget(profile.step_time, profiler.worst_shapes(), slo_tbt_seconds)
        config = dataclasses.replace(config, token_budget=budget)
    logger.info(
        "step times of %s: held-out error %.1f %% (median), %.1f %% (P90); token budget %d",
        profile.date, 100 * profile.error.median, 100 * profile.error.p90, config.token_budget,
    )  # fmt: skip
    return Pace.of(slo_tbt_seconds, profile.step_time, profile.error), config
