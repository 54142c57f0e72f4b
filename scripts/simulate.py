"""Serving on hardware that you don't have: latencies at a rate, capacities, and which deployment serves most.

simulate.py --model mistral-7b --device a100-80g --rate 2             one run
simulate.py --model yi-34b --tp 2 --p99-tbt 0.2                       its capacity under that objective
simulate.py --model yi-34b --tp 2 --p99-tbt 0.2 --sweep budgets       which token budget; also: policies, shapes
simulate.py ... --sweep shapes --serve 20 --plot shapes.png           TP or PP; replicas for 20 requests/s; a picture
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from jaxserve.config import ConfigError, parse_config
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.workload import WorkloadConfig
from jaxserve.models.config import ModelConfig, ModelError
from jaxserve.models.presets import PRESETS
from jaxserve.models.registry import read_config
from jaxserve.request import RequestError
from jaxserve.scheduler import POLICIES, Pace
from jaxserve.scheduler.step_time import Profile, StepTimeModel
from jaxserve.simulator.cost import OVERLAPPED, FittedCost, authors_host_time
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.devices import DEVICES, find_device
from jaxserve.simulator.sweep import COLUMNS, SWEEPS, Candidate, plot, rate_candidate, simulate, variants, whole_prompts


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


def measured_steps(path: str) -> StepTimeModel:
    try:
        return Profile.from_json(Path(path).read_text(encoding="utf-8")).step_time
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile: cannot read {path!r}: {error}") from None


def show(candidates: list[Candidate], serve: float | None) -> None:
    columns = dict(COLUMNS)
    if serve is not None:
        columns[f"replicas for {serve:g}/s"] = lambda c: f"{c.replicas(serve):.0f} ({c.deployment.num_devices} each)"
    width = max(len(c.name) for c in candidates)
    print(" " * width, *(f"{name:>{max(10, len(name))}}" for name in columns))
    for candidate in candidates:
        cells = (f"{cell(candidate):>{max(10, len(name))}}" for name, cell in columns.items())
        print(f"{candidate.name:{width}}", *cells)


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
    parser.add_argument("--authors-host", action="store_true", help="the paper's engine, whose host delays each step")
    parser.add_argument("--profile", help="step times measured by profile_steps.py instead of the roofline's")
    parser.add_argument("--p99-tbt", type=float, help="objective in seconds: search the capacity")
    parser.add_argument("--median-delay", type=float, default=2.0, help="objective: scheduling delay in seconds")
    parser.add_argument("--low", type=float, default=0.05, help="lowest rate of the search, requests/s")
    parser.add_argument("--high", type=float, default=100.0, help="highest rate of the search, requests/s")
    parser.add_argument("--sweep", choices=SWEEPS, help="capacities of several; shapes divide tp x pp devices")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="of that sweep")
    parser.add_argument("--serve", type=float, help="how many replicas for that many requests/s")
    parser.add_argument("--plot", help="write a picture of the capacities and TBTs to this file")
    workload, args = parse_config(parser, None, WorkloadConfig)
    try:
        model = model_config(args.model)
        steps = measured_steps(args.profile) if args.profile else None
        deployment = Deployment(
            model=model,
            device=find_device(args.device),
            tensor=args.tp,
            pipeline=args.pp,
            token_budget=args.token_budget,
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.max_model_len,
            host=authors_host_time(args.tp) if args.authors_host else OVERLAPPED,
            measured=FittedCost(steps, model.window) if steps else None,
            pace=Pace(args.p99_tbt, steps) if steps and args.p99_tbt else None,
        )
        deployment = whole_prompts(deployment, args.scheduler)
        if args.p99_tbt is None:
            if args.sweep or args.serve or args.plot:
                parser.error("sweep, serve and plot need an objective: give --p99-tbt")
            started = time.perf_counter()
            run = simulate(deployment, workload, workload.rate or 1.0)
            seconds = time.perf_counter() - started
            show([Candidate(args.model, deployment, workload.rate or 1.0, run)], None)
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
    show(candidates, args.serve)
    if not all(candidate.queue_could_grow(objective) for candidate in candidates):
        print("requests came for too short a time for a queue to show: give more --num-requests or --duration-seconds")
    if args.plot:
        plot(candidates, objective, args.plot)


if __name__ == "__main__":
    main()
