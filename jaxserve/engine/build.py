"""What an engine is made of: from a configuration to loaded, compiled and warm parts."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine.memory import budget_on_device
from jaxserve.engine.profiling import Profiler, largest_budget, read_profile
from jaxserve.engine.runner import ModelRunner, prepare
from jaxserve.engine.startup import StartupTimes, timed
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import generation, hf_tokenizer
from jaxserve.models.loading.files import read_text
from jaxserve.models.loading.hub import resolve
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Limits, Pace, Scheduler
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
    if config.token_budget == "auto" and not config.needs_step_times:
        resolved = dataclasses.replace(resolved, token_budget=budget_on_device(resolved, checkpoint.config))
        logger.info("token budget %d", resolved.token_budget)
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
    draft_pace = None
    if resolved.max_drafts and config.warmup:
        draft_pace = Pace(config.slo_tbt_seconds or math.inf, Profiler(runner).draft_times())
    limits = resolved.limits(runner.num_blocks, window=checkpoint.config.window, pace=pace, draft_pace=draft_pace)
    if config.swap_space_bytes:
        limits = _with_swap_space(limits, runner)
    scheduler = config.policy(limits)
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


def _with_swap_space(limits: Limits, runner: ModelRunner) -> Limits:
    """With as many blocks of it as its bytes hold, by times measured now. Raises ConfigError."""
    num_bytes, block_bytes = runner.config.swap_space_bytes, runner.block_bytes
    if limits.window is not None:
        raise ConfigError(
            f"swap_space_bytes must be 0 for a model that looks back {limits.window} tokens at most, got {num_bytes}"
        )
    if jax.process_count() > 1:
        raise ConfigError(f"swap_space_bytes must be 0 on several hosts, got {num_bytes}")
    if num_bytes < block_bytes:
        raise ConfigError(f"swap_space_bytes must hold a KV block of {block_bytes} bytes at least, got {num_bytes}")
    profiler = Profiler(runner)
    copied_seconds = profiler.seconds_per_swapped_block()
    computed_seconds = profiler.seconds_per_prefill_token() * limits.block_size
    logger.info(
        "a KV block of %d tokens goes to the swap space and back in %.3f ms, and is computed in %.3f ms: %s",
        limits.block_size, 1e3 * copied_seconds, 1e3 * computed_seconds,
        "swapped" if copied_seconds < computed_seconds else "not swapped",
    )  # fmt: skip
    num_blocks = num_bytes // block_bytes
    return limits.with_swap_space(num_blocks, copied_seconds=copied_seconds, computed_seconds=computed_seconds)


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
