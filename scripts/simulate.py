"""Serving on hardware that you don't have: latencies at a rate, capacities, and which deployment serves most.

simulate.py --model mistral-7b --device a100-80g --rate 2             one run
simulate.py --model yi-34b --tp 2 --p99-tbt 0.2                       its capacity under that objective
simulate.py --model yi-34b --tp 2 --p99-tbt 0.2 --sweep budgets       which token budget; also: policies, shapes
simulate.py ... --sweep shapes --serve 20 --plot shapes.png           TP or PP; replicas for 20 requests/s; a picture
simulate.py --model yi-34b --pp 4 --rate 1 --bubbles                  what policies leave idle of a pipeline's stages
simulate.py --device h100 --rate 4 --speculative-acceptance 0.7    what drafts would gain
simulate.py --profile steps.json --against capacity.json              how far the simulator is from what was measured
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from jaxserve.cli import parse_config
from jaxserve.errors import ConfigError, ModelError, RequestError
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.workload import WorkloadConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.presets import PRESETS
from jaxserve.models.registry import read_config
from jaxserve.scheduler import POLICIES, Pace
from jaxserve.scheduler.buckets import token_buckets
from jaxserve.scheduler.step_time import Profile
from jaxserve.simulator import bubbles
from jaxserve.simulator.cost import OVERLAPPED, FittedCost, authors_host_time
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.devices import DEVICES, find_device
from jaxserve.simulator.pace import fit_pace
from jaxserve.simulator.sweep import COLUMNS, SWEEPS, Candidate, plot, rate_candidate, simulate, variants, whole_prompts
from jaxserve.simulator.validate import predict


def model_config(name: str) -> ModelConfig:
    """Of a preset, or of a folder's config.json."""
    if name in PRESETS:
        return read_config(PRESETS[name], name)
    path = Path(name) / "config.json"
    try:
        return read_config(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model must be one of {', '.join(PRESETS)} or a folder with a config.json: {error}"
        ) from None


def choose_pace(deployment: Deployment, slo_tbt_seconds: float, profile: Profile | None) -> Pace:
    """By measured steps, or by those of the simulated device."""
    if profile is not None:
        return Pace.of(slo_tbt_seconds, profile.step_time, profile.error)
    return fit_pace(
        slo_tbt_seconds,
        deployment.cost,
        token_buckets(deployment.token_budget),
        max_num_seqs=deployment.max_num_seqs,
        contexts=[deployment.max_model_len // part for part in (16, 8, 4, 2, 1)],
        window=deployment.model.window,
    )


def show_predictions(report_path: str, profile: Profile) -> None:
    """Beside what bench.py capacity --report measured on a real engine."""
    try:
        predictions = predict(json.loads(Path(report_path).read_text(encoding="utf-8")), profile)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"against: {report_path!r} is no report of bench.py capacity: {error!r}") from None
    print("P99 TBT and median delay at each measured rate, then the capacities: measured, simulated, error")
    for found in predictions:
        for trial in found.trials:
            print(f"  {found.policy:14} {trial.rate:6.3g}/s  {1000 * trial.measured_p99_tbt_seconds:8.1f} ms "
                  f"{1000 * trial.simulated_p99_tbt_seconds:8.1f} ms  {trial.measured_delay_seconds:6.2f} s "
                  f"{trial.simulated_delay_seconds:6.2f} s")  # fmt: skip
        print(f"{found.policy:16} {found.measured:6.3g}/s  {found.simulated:8.3g}/s  {found.error:+.1%}")


def show[T](rows: Mapping[str, T], columns: Mapping[str, Callable[[T], str]]) -> None:
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{title:>{max(10, len(title))}}" for title in columns))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{cell(row):>{max(10, len(title))}}" for title, cell in columns.items()))


def show_candidates(candidates: list[Candidate], serve: float | None) -> None:
    columns = dict(COLUMNS)
    if serve is not None:
        columns[f"replicas for {serve:g}/s"] = lambda c: f"{c.replicas(serve):.0f} ({c.deployment.num_devices} each)"
    show({c.name: c for c in candidates}, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mistral-7b", help=f"{', '.join(PRESETS)}, or a folder with a config.json")
    parser.add_argument("--device", default="a100-80g", help=", ".join(DEVICES))
    parser.add_argument("--tp", type=int, default=1, help="tensor parallelism")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--scheduler", default="sarathi", choices=POLICIES)
    parser.add_argument("--token-budget", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--swap-space-bytes", type=int, default=0, help="host memory behind the prefix cache")
    parser.add_argument("--speculative-acceptance", type=float, metavar="SHARE",
                        help="speculative decoding: how likely a draft is to hold if those before it do")  # fmt: skip
    parser.add_argument("--num-speculative-tokens", type=int, default=7, help="most drafts of a sequence in a step")
    parser.add_argument("--authors-host", action="store_true", help="the paper's engine, whose host delays each step")
    parser.add_argument("--profile", help="step times measured by profile_steps.py instead of the roofline's")
    parser.add_argument("--against", metavar="REPORT.json", help="of bench.py capacity: predict it from the profile")
    parser.add_argument("--p99-tbt", type=float, help="objective in seconds: search the capacity")
    parser.add_argument("--median-delay", type=float, default=2.0, help="objective: scheduling delay in seconds")
    parser.add_argument("--low", type=float, default=0.05, help="lowest rate of the search, requests/s")
    parser.add_argument("--high", type=float, default=100.0, help="highest rate of the search, requests/s")
    parser.add_argument("--sweep", choices=SWEEPS, help="capacities of several; shapes divide tp x pp devices")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="of that sweep")
    parser.add_argument("--serve", type=float, help="how many replicas for that many requests/s")
    timeless = sorted(name for name, policy in POLICIES.items() if not policy.needs_step_times)
    parser.add_argument("--bubbles", nargs="*", metavar="POLICY", choices=timeless,
                        help=f"idle time of a pipeline's stages by policy: {', '.join(bubbles.DEFAULT)}")  # fmt: skip
    parser.add_argument("--plot", help="write a picture of the capacities and TBTs to this file")
    workload, args = parse_config(parser, None, WorkloadConfig)
    try:
        profile = Profile.read(args.profile) if args.profile else None
        if args.against:
            if profile is None:
                parser.error("against needs the step times of the measured engine: give --profile")
            show_predictions(args.against, profile)
            return
        model = model_config(args.model)
        deployment = Deployment(
            model=model,
            device=find_device(args.device),
            tensor=args.tp,
            pipeline=args.pp,
            token_budget=args.token_budget,
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            swap_space_bytes=args.swap_space_bytes,
            host=authors_host_time(args.tp) if args.authors_host else OVERLAPPED,
            num_speculative_tokens=args.num_speculative_tokens,
            speculative_acceptance=args.speculative_acceptance,
            measured=FittedCost(profile.step_time, model.window) if profile else None,
        )
        if args.p99_tbt is not None:
            if args.bubbles is not None:
                parser.error("bubbles are of one rate, an objective asks for the highest: give --rate, not --p99-tbt")
            deployment = replace(deployment, pace=choose_pace(deployment, args.p99_tbt, profile))
        deployment = whole_prompts(deployment, args.scheduler)
        if args.p99_tbt is None:
            if args.sweep or args.serve or args.plot:
                parser.error("sweep, serve and plot need an objective: give --p99-tbt")
            if args.bubbles is not None:
                show(bubbles.compare(deployment, args.bubbles or bubbles.DEFAULT, workload), bubbles.COLUMNS)
                return
            started = time.perf_counter()
            run = simulate(deployment, workload, workload.rate or 1.0)
            seconds = time.perf_counter() - started
            show_candidates([Candidate(args.model, deployment, workload.rate or 1.0, run)], None)
            print(f"{run.seconds:.0f} s in {seconds:.1f} s, {run.seconds / seconds:.0f}x real time; "
                  f"{run.num_batches} batches")  # fmt: skip
            return
        objective = Objective(args.p99_tbt, args.median_delay)
        compared = variants(deployment, args.sweep, args.budgets) if args.sweep else {args.model: deployment}
        candidates = [
            rate_candidate(name, variant, workload, objective, low=args.low, high=args.high)
            for name, variant in compared.items()
        ]
    except (ConfigError, ModelError, RequestError) as error:
        parser.error(str(error))
    show_candidates(candidates, args.serve)
    if not all(candidate.queue_could_grow(objective) for candidate in candidates):
        print("requests came for too short a time for a queue to show: give more --num-requests or --duration-seconds")
    if args.plot:
        plot(candidates, objective, args.plot)


if __name__ == "__main__":
    main()
