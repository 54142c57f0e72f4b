"""Time steps on the machine at hand and find the largest token budget that meets an objective.

profile_steps.py --slo-tbt 0.1 --output budget.json
serve.py --token-budget auto --slo-tbt 0.1 --profile budget.json

Budgets up to --token-budget are tried; auto tries up to the longest prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.engine.profiling import Profiler, largest_budget
from jaxserve.engine.runner import ModelRunner, prepare
from jaxserve.errors import ConfigError, ModelError
from jaxserve.scheduler.step_time import Profile, Sample
from jaxserve.sharding.mesh import make_mesh


def print_samples(profile: Profile, samples: Sequence[Sample]) -> None:
    print(f"{'rows':>6} {'decodes':>8} {'KV tokens':>10} {'prefill':>8} {'pairs':>10} {'ms':>9} {'model ms':>9}")
    for shape, seconds in samples:
        print(f"{shape.num_rows:6} {shape.num_decodes:8} {shape.num_kv_tokens:10} {shape.num_prefill_tokens:8} "
              f"{shape.num_pairs:10} {1000 * seconds:9.2f} {1000 * profile.step_time.predict(shape):9.2f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the profile")
    config, args = parse_config(parser, argv, EngineConfig)
    slo_tbt_seconds = config.slo_tbt_seconds
    if slo_tbt_seconds is None:
        parser.error("--slo-tbt-seconds must be given")
    if config.pipeline_parallel > 1:
        parser.error(f"--pipeline-parallel must be 1, steps are timed one at a time, got {config.pipeline_parallel}")
    try:
        checkpoint, resolved = prepare(config)
        runner = ModelRunner(resolved, checkpoint, make_mesh(config.tensor_parallel), show_progress=True)
        if config.warmup:
            runner.warm_up()
        profiler = Profiler(runner)
        profile, samples = profiler.profile(stop_seconds=slo_tbt_seconds)
        print_samples(profile, samples)
        print(f"{profile.model}, {profile.dtype} on {profile.device}, {profile.date}; held-out error "
              f"{profile.error.median:.1%} (median), {profile.error.p90:.1%} (P90)")  # fmt: skip
        if args.output is not None:
            args.output.write_text(profile.to_json())
        worst = profiler.worst_shapes()
        budget = largest_budget(profile.step_time, worst, slo_tbt_seconds)
    except (ConfigError, ModelError, OSError) as error:
        print(f"profile_steps: error: {error}", file=sys.stderr)
        return 2
    print(f"token budget {budget}: {resolved.max_num_seqs - 1} decodes and a chunk at {profiler.context_tokens} tokens "
          f"take {1000 * profile.step_time.predict(worst[budget]):.1f} ms of {1000 * slo_tbt_seconds:g}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
