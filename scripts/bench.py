"""Benchmarks on the machine at hand.

bench.py throughput   offline: output and prompt tokens per second, and where a step's time goes
bench.py stall        TBT of running decodes while a long prompt arrives: stall-free against prefill-first
bench.py load         time and host memory to load a synthetic checkpoint of 4 GiB
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from jaxserve.config import EngineConfig, parse_config
from jaxserve.engine.engine import Engine
from jaxserve.evaluation.loading import measure_load, write_synthetic
from jaxserve.evaluation.stall import measure_stall
from jaxserve.evaluation.throughput import measure_throughput, random_prompts


def throughput(config: EngineConfig, args: argparse.Namespace) -> None:
    engine = Engine(config)
    prompts = random_prompts(args.requests, args.prompt_tokens, engine.model_config.vocab_size)
    measure_throughput(engine, prompts, args.output_tokens)  # warm caches, discarded
    results = [measure_throughput(engine, prompts, args.output_tokens) for _ in range(args.rounds)]
    engine.close()
    result = sorted(results, key=lambda r: r.seconds)[len(results) // 2]
    steps, per_step = result.steps, 1000 / result.steps.num_steps
    print(f"{args.requests} requests x ({args.prompt_tokens} prompt + {args.output_tokens} output tokens), "
          f"budget {config.token_budget}, {engine.config.dtype}; median of {args.rounds} rounds")  # fmt: skip
    print(f"  output tokens/s   {result.output_tokens_per_second:8.1f}")
    print(f"  prompt tokens/s   {result.prompt_tokens_per_second:8.1f}")
    print(f"  total             {result.seconds:8.2f} s in {steps.num_steps} steps")
    print(f"  device per step   {steps.device_seconds * per_step:8.2f} ms "
          f"(median {statistics.median(steps.step_seconds) * 1000:.2f})")  # fmt: skip
    print(f"  host gap per step {steps.host_seconds * per_step:8.2f} ms (device idle)")
    print(f"  padding           {1 - steps.num_tokens / steps.num_rows:8.1%} of rows")


def stall(config: EngineConfig, args: argparse.Namespace) -> None:
    length = config.max_model_len or 2048
    policies = {
        "sarathi": dataclasses.replace(config, max_model_len=length),
        "prefill_first": dataclasses.replace(
            config, max_model_len=length, scheduler="prefill_first", token_budget=length
        ),
    }
    print(f"{args.decodes} running decodes, a prompt of {args.long_prompt} tokens arrives; {args.rounds} rounds; "
          "decode TBT in ms until its first token")  # fmt: skip
    engines = {name: Engine(policy) for name, policy in policies.items()}
    results = {name: [] for name in engines}
    for seed in range(args.rounds):
        for name, engine in engines.items():
            results[name].append(
                measure_stall(engine, num_decodes=args.decodes, prompt_tokens=args.long_prompt, seed=seed)
            )
    print(f"{'policy':14} {'budget':>6} {'p50':>8} {'p99':>8} {'max':>8} {'stalls':>7} {'TTFT s':>7}")
    for name, rounds in results.items():
        p50, p99, worst = (1000 * statistics.median(r.percentile(share) for r in rounds) for share in (50, 99, 100))
        stalls = statistics.median(r.num_stalls for r in rounds)
        ttft = statistics.median(r.ttft_seconds for r in rounds)
        budget = policies[name].token_budget
        print(f"{name:14} {budget:6} {p50:8.1f} {p99:8.1f} {worst:8.1f} {stalls:7.0f} {ttft:7.2f}")
        engines[name].close()


def load(config: EngineConfig, args: argparse.Namespace) -> None:
    gib = 2**30
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        write_synthetic(Path(folder))
        results = [measure_load(Path(folder)) for _ in range(args.rounds)]
    seconds = statistics.median(r.seconds for r in results)
    size, largest = results[0].checkpoint_bytes, results[0].largest_tensor_bytes
    print(f"checkpoint of {size / gib:.2f} GiB in bfloat16, largest tensor {largest / gib:.2f} GiB; "
          f"{args.rounds} rounds")  # fmt: skip
    print(f"  seconds, median   {seconds:8.2f}   ({size / gib / seconds:.2f} GiB/s)")
    print(f"  peak host memory  {max(r.peak_host_bytes for r in results) / gib:8.2f} GiB besides the parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("throughput", "stall", "load"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="throughput: number of requests")
    parser.add_argument("--prompt-tokens", type=int, default=151, help="throughput: tokens of each prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="throughput: forced output tokens of each")
    parser.add_argument("--decodes", type=int, default=8, help="stall: requests that decode")
    parser.add_argument("--long-prompt", type=int, default=1500, help="stall: tokens of the prompt that arrives")
    parser.add_argument("--scratch", help="load: folder for the synthetic checkpoint; the system's by default")
    config, args = parse_config(parser, None, EngineConfig)
    {"throughput": throughput, "stall": stall, "load": load}[args.benchmark](config, args)


if __name__ == "__main__":
    main()
