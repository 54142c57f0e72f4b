"""Benchmarks on the machine at hand.

bench.py throughput   offline: output and prompt tokens per second, and where a step's time goes
bench.py stall        TBT of running decodes while a long prompt arrives: stall-free against prefill-first
bench.py load         time and host memory to load a synthetic checkpoint of 4 GiB
bench.py serve        TTFT, TBT, scheduling delay and goodput of a workload: through a gRPC server or in this process
bench.py capacity     the highest request rate at which each policy meets a TBT objective
bench.py kernels      attention kernels alone on a GPU: errors, times, shares of the ceilings
bench.py products     matrix products of a CPU by dense weights and by codes, for 1 to 256 rows
bench.py step         whole steps of the engine beside their roofline, and what the device waits for between them
bench.py experts      a layer's mixture of experts beside the products of the experts that its rows choose
bench.py host         what the host does in a step with 1,000 running requests and up to 100,000 waiting, by part
bench.py soak         hundreds of streams that leave, are aborted and dawdle, and a few that do not: what is left behind
bench.py sharing      what requests do to one another: grammars, prefixes, fairness, or the floor of a running stream
bench.py speculation  tokens per second with drafts and without, of texts that repeat what was there more or less
bench.py front-end    CPU time of a server's threads per output token, and tokens per second, through gRPC and HTTP

bench.py serve --help, say, lists the flags of one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import grpc

from jaxserve.cli import as_flags, parse_config
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.memory import claim_gpu_memory
from jaxserve.errors import ConfigError, ModelError
from jaxserve.evaluation import (
    expert_bench,
    host_bench,
    kernel_bench,
    product_bench,
    sharing_report,
    speculation_bench,
    step_bench,
)
from jaxserve.evaluation.capacity import SearchConfig, Trial
from jaxserve.evaluation.device_bench import QUICK, THOROUGH, measure_ceilings
from jaxserve.evaluation.front_end import FrontEndConfig, measure_front_end
from jaxserve.evaluation.front_end import rows as front_end_rows
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.loading import measure_load, write_synthetic
from jaxserve.evaluation.report import (
    Series,
    capacity_rows,
    check_can_report,
    draft_rows,
    processor,
    summary_row,
    text_table,
    write_report,
)
from jaxserve.evaluation.serving import ObjectiveConfig, compare_capacity, run_engine, run_server
from jaxserve.evaluation.soak import SoakConfig
from jaxserve.evaluation.soak import soak as run_soak
from jaxserve.evaluation.stall import measure_stall
from jaxserve.evaluation.throughput import measure_throughput, random_prompts
from jaxserve.evaluation.tiny_model import tiny_config, write_tiny_model
from jaxserve.evaluation.workload import WorkloadConfig
from jaxserve.scheduler import POLICIES
from jaxserve.server.process import ServerProcess, ServerProcessError, running_process

SERVER = Path(__file__).with_name("serve.py")
SERVER_SECONDS = 3600.0
"""After which a server under a benchmark is taken to hang."""
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def throughput(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="number of requests")
    parser.add_argument("--prompt-tokens", type=int, default=151, help="tokens of each prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="forced output tokens of each")
    config, args = parse_config(parser, argv, EngineConfig)
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


def stall(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decodes", type=int, default=8, help="requests that decode")
    parser.add_argument("--long-prompt", type=int, default=1500, help="tokens of the prompt that arrives")
    config, args = parse_config(parser, argv, EngineConfig)
    length = config.max_model_len or 2048
    policies = {
        "sarathi": dataclasses.replace(config, max_model_len=length),
        "prefill_first": dataclasses.replace(
            config, max_model_len=length, scheduler="prefill_first", token_budget=length
        ),
    }
    print(f"{args.decodes} running decodes, a prompt of {args.long_prompt} tokens arrives; {args.rounds} rounds; "
          "decode TBT in ms until its first token")  # fmt: skip
    print(f"{'policy':14} {'budget':>6} {'p50':>8} {'p99':>8} {'max':>8} {'stalls':>7} {'TTFT s':>7}")
    for name, policy in policies.items():
        engine = Engine(policy)  # one after the other: each takes a GPU's whole memory
        rounds = [
            measure_stall(engine, num_decodes=args.decodes, prompt_tokens=args.long_prompt, seed=seed)
            for seed in range(args.rounds)
        ]
        engine.close()
        p50, p99, worst = (1000 * statistics.median(r.percentile(share) for r in rounds) for share in (50, 99, 100))
        stalls = statistics.median(r.num_stalls for r in rounds)
        ttft = statistics.median(r.ttft_seconds for r in rounds)
        print(f"{name:14} {policy.token_budget:6} {p50:8.1f} {p99:8.1f} {worst:8.1f} {stalls:7.0f} {ttft:7.2f}")


def load(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for the synthetic checkpoint; the system's by default")
    args = parser.parse_args(argv)
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


def serve(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--target", help="host:port of a running server; one of its own is started by default")
    parser.add_argument("--metrics-url", help="where the running server shows its metrics, to count its drafts")
    parser.add_argument("--in-process", action="store_true", help="drive the engine directly, without gRPC")
    parser.add_argument("--report", metavar="FILE.html", help="write a report, and its numbers beside it as .json")
    config, workload, limits, args = parse_config(parser, argv, EngineConfig, WorkloadConfig, ObjectiveConfig)
    if args.report:
        check_can_report(args.report)
    if args.metrics_url and not args.target:
        parser.error(f"--metrics-url is that of --target, got {args.metrics_url!r} without")
    objective = limits.objective(math.nan) if limits.tbt_seconds else None
    if args.in_process:
        engine = Engine(config)
        run_engine(engine, dataclasses.replace(workload, num_requests=2, duration_seconds=None))  # warm, discarded
        run = run_engine(engine, workload)
        engine.close()
    elif args.target:
        run = run_server(args.target, workload, metrics_url=args.metrics_url)
    else:
        with server_of(config) as server:
            run = run_server(server.address, workload, metrics_url=f"{server.url}/metrics")
    result = Series(args.target or config.scheduler, run, workload.mean_rate)
    print(text_table([summary_row(result, objective)]))
    if drafts := draft_rows([result]):
        print(f"\n{text_table(drafts)}")
    if args.report:
        settings = {"engine": vars(config)} if not args.target else {"server": {"target": args.target}}
        finish_report(args.report, "jaxserve under load", [result], objective, settings | {"workload": vars(workload)})


def capacity(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=["sarathi", "prefill_first"], help="instead of --scheduler"
    )
    parser.add_argument("--report", metavar="FILE.html", help="write a report, and its numbers beside it as .json")
    configs = EngineConfig, WorkloadConfig, SearchConfig, ObjectiveConfig
    config, workload, search, limits, args = parse_config(parser, argv, *configs)
    if args.report:
        check_can_report(args.report)
    config = dataclasses.replace(config, max_model_len=config.max_model_len or 2048)

    def show_objective(objective: Objective) -> None:
        print(f"objective: P99 TBT {1000 * objective.p99_tbt_seconds:.0f} ms, "
              f"median scheduling delay {objective.median_delay_seconds:g} s", flush=True)  # fmt: skip

    def show_trial(policy: str, trial: Trial) -> None:
        summary = trial.summary
        print(f"  {policy:14} {trial.rate:7.3g}/s  seed {trial.seed}  TBT p99 {1000 * summary.tbt.at(99):7.1f} ms  "
              f"delay p50 {summary.delay.at(50):6.2f} s  {'meets it' if trial.passed else 'fails'}",
              flush=True)  # fmt: skip

    objective, results = compare_capacity(
        config, args.policies, workload, search, limits, on_trial=show_trial, on_objective=show_objective
    )
    print(f"\n{text_table(capacity_rows(results))}\n\n{text_table([summary_row(r, objective) for r in results])}")
    if args.report:
        settings = {"engine": vars(config), "workload": vars(workload), "search": vars(search)}
        finish_report(args.report, "Capacity by policy", results, objective, settings | {"objective": vars(limits)})


def kernels(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--cases", nargs="+", choices=kernel_bench.CASES, default=list(kernel_bench.CASES))
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=kernel_bench.BACKENDS,
        default=list(kernel_bench.BACKENDS),
        help="attention kernels",
    )
    parser.add_argument("--quick", action="store_true", help="no variants, and shorter measurements")
    parser.add_argument("--tiny", action="store_true", help="small cases, to try the benchmark itself on any machine")
    add_output_dir(parser)
    args = parser.parse_args(argv)
    folder = output_dir(args)
    bench = kernel_bench.KernelBench(args.backends, quick=args.quick, tiny=args.tiny)
    rows: list[kernel_bench.Row] = []
    kinds = (True,) if args.quick else (True, False)
    for row in itertools.chain.from_iterable(bench.rows(args.cases, plain=plain) for plain in kinds):
        rows.append(row)
        time = row.failure or f"{1e6 * row.seconds.median:9.1f} us"
        print(f"{row.case.name:20} {row.backend:7} {row.variant.name:17} {time}", flush=True)
        paths = kernel_bench.write_kernels(folder, rows, bench.ceilings)  # every time: the machine may be taken away
    print(f"\n{text_table([kernel_bench.describe(row, rows, bench.ceilings) for row in rows])}")
    print("written: {}, {}".format(*paths))


def products(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    for name, known in (("shapes", list(product_bench.SHAPES)), ("weights", product_bench.KINDS)):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known)
    parser.add_argument("--rows", nargs="+", type=int, default=product_bench.ROWS, help="of x")
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    args = parser.parse_args(argv)
    effort = QUICK if args.quick else THOROUGH
    print(text_table(list(product_bench.measure_products(args.shapes, args.weights, args.rows, effort))))


def step(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument(
        "--buckets", nargs="+", type=int, help="compile and measure these step programs only; all by default"
    )
    parser.add_argument("--requests", type=int, default=256, help="number of requests of the engine under load")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="forced output tokens of each")
    add_output_dir(parser)
    parser.set_defaults(token_budget=2048, max_num_seqs=128, max_model_len=8192)
    config, args = parse_config(parser, argv, EngineConfig)
    if config.pipeline_parallel > 1:
        parser.error(f"--pipeline-parallel must be 1, steps are timed one at a time, got {config.pipeline_parallel}")
    folder, effort = output_dir(args), QUICK if args.quick else THOROUGH
    claim_gpu_memory(config.gpu_memory_utilization)
    ceilings = measure_ceilings(effort)  # before the engine takes the memory
    bench = step_bench.StepBench(config, effort, buckets=args.buckets)
    engine = bench.engine
    rows: list[step_bench.StepRow] = []
    left_out = {}
    # Every time: the machine may be taken away.
    write = partial(step_bench.write_steps, folder, rows, ceilings, left_out=left_out, settings=vars(engine.config))
    for case in step_bench.step_cases():
        reason = step_bench.why_not(case, engine.runner)
        if reason is None:
            rows.append(bench.measure(case))
            print(f"{case.name:34} {1e3 * rows[-1].seconds.median:9.3f} ms", flush=True)
        else:
            left_out[case.name] = reason
            print(f"{case.name:34} not measured: {reason}", flush=True)
        write(gap=None)
    prompts = random_prompts(args.requests, args.prompt_tokens, engine.model_config.vocab_size)
    measure_throughput(engine, prompts[: config.max_num_seqs], 2)  # warm, discarded
    gap = step_bench.host_gap(measure_throughput(engine, prompts, args.output_tokens))
    engine.close()
    if rows:
        print(f"\n{text_table([step_bench.describe(row, ceilings) for row in rows])}")
    print(f"\nunder load: {1e3 * gap['gap_seconds_per_step']:.3f} ms between steps in which the device waits, "
          f"{1e3 * gap['device_seconds_per_step']:.3f} ms in which it works")  # fmt: skip
    print("written: {}, {}".format(*write(gap=gap)))


def experts(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256], help="of the batch")
    parser.set_defaults(model="qwen3-30b-a3b", dtype="bfloat16")
    config, args = parse_config(parser, argv, EngineConfig)
    effort = QUICK if args.quick else THOROUGH
    rows = [case.measure(effort) for case in expert_bench.expert_cases(config, args.rows)]
    print(f"a layer of {config.model}, {config.dtype}")
    print(text_table([row.describe() for row in rows]))


def host(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--waiting", nargs="+", type=int, default=[1_000, 10_000, 100_000], help="lengths of the queue")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="steps of each queue in a round")
    parser.set_defaults(token_budget=2048, max_num_seqs=1000, max_model_len=8192, block_size=64)
    config, args = parse_config(parser, argv, EngineConfig)
    results = host_bench.measure_host(config, args.waiting, args.rounds, args.steps)
    print(f"{config.scheduler}, {config.max_num_seqs} running, budget {config.token_budget}; {args.rounds} rounds of "
          f"{args.steps} steps, medians in microseconds of the thread's CPU time")  # fmt: skip
    print(text_table([{"waiting": f"{waiting:,}"} | times.row() for waiting, times in results.items()]))


def soak(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    config, _ = parse_config(parser, argv, SoakConfig)
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        with server_of(tiny_config(Path(folder), config.streams + config.well_behaved)) as server:
            result = run_soak(server, config)
    print(f"{config.streams} streams and {config.well_behaved} well-behaved ones, {config.seconds:g} s")
    rows = result.rows()
    print(text_table(rows), *result.tally.errors, sep="\n")
    return int(any(row["met"] == "NO" for row in rows))


def speculation(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=96, help="forced output tokens of each request")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="requests at once")
    parser.add_argument("--texts", nargs="+", choices=speculation_bench.KINDS, default=list(speculation_bench.KINDS))
    parser.set_defaults(speculative="ngram", max_model_len=1024)
    config, args = parse_config(parser, argv, EngineConfig)
    bench = speculation_bench.SpeculationBench(config, rounds=args.rounds, output_tokens=args.output_tokens)
    speeds = []
    for speed in bench.speeds(args.texts, args.batches):
        speeds.append(speed)
        print(text_table([speed.row()]).splitlines()[-1], flush=True)
    bench.close()
    print(f"\n{config.speculative}, {config.num_speculative_tokens} drafts at most, budget {config.token_budget}; "
          f"{args.output_tokens} tokens of each request, medians of {args.rounds} alternating rounds")  # fmt: skip
    print(text_table([speed.row() for speed in speeds]))
    for batch, gain in speculation_bench.mean_gains(speeds).items():
        print(f"batch {batch}: geometric mean of {', '.join(speculation_bench.GAINING)} {gain:.2f}x")


def front_end(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--tiny", action="store_true", help="a model that costs next to nothing, instead of --model")
    parser.set_defaults(max_num_seqs=64, token_budget=128, max_model_len=1024)
    config, load, args = parse_config(parser, argv, EngineConfig, FrontEndConfig)
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            write_tiny_model(Path(folder))
            config = tiny_config(Path(folder), config.max_num_seqs)
        with server_of(config) as server:
            engine = Engine(config)
            rounds = measure_front_end(engine, server, load)
            engine.close()
    print(f"{load.streams} streams of {load.output_tokens} tokens, {config.max_num_seqs} at once; medians of "
          f"{load.rounds} rounds, CPU time in microseconds per output token")  # fmt: skip
    print(text_table(front_end_rows(rounds)))


def sharing(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("part", choices=sharing_report.PARTS)
    config, asked, args = parse_config(parser, argv, EngineConfig, sharing_report.SharingConfig)
    rows = sharing_report.PARTS[args.part](config, asked)
    print(f"{args.part}: medians of {asked.rounds} rounds", text_table(rows), sep="\n")


def server_of(config: EngineConfig) -> AbstractContextManager[ServerProcess]:
    """scripts/serve.py with both doors open."""
    command = [sys.executable, str(SERVER), "--port", "0", "--http-port", "0", *as_flags(config)]
    return running_process(command, timeout_seconds=SERVER_SECONDS)


def add_output_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help=f"folder of the results (default: {RESULTS})")


def output_dir(args: argparse.Namespace) -> Path:
    if not args.output_dir.is_dir():
        raise ConfigError(f"output_dir must be a folder that exists, got {str(args.output_dir)!r}")
    return args.output_dir


def finish_report(
    path: str, title: str, results: list[Series], objective: Objective | None, settings: dict[str, dict[str, object]]
) -> None:
    json_path = write_report(path, title, results, objective, settings)
    print(f"report: {path}, numbers: {json_path}")


COMMANDS = {
    "throughput": throughput,
    "stall": stall,
    "load": load,
    "serve": serve,
    "capacity": capacity,
    "kernels": kernels,
    "products": products,
    "step": step,
    "experts": experts,
    "host": host,
    "soak": soak,
    "speculation": speculation,
    "front-end": front_end,
    "sharing": sharing,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=COMMANDS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the benchmark and the engine")
    args = parser.parse_args()
    benchmark = argparse.ArgumentParser(prog=f"bench.py {args.benchmark}")
    # Rounds and rates repeat their prompts, of which a cache would leave little to measure.
    benchmark.set_defaults(enable_prefix_caching=False)
    try:
        print(processor(), flush=True)
        return COMMANDS[args.benchmark](benchmark, args.flags) or 0
    except (ConfigError, ModelError, ServerProcessError, TimeoutError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    except grpc.RpcError as error:
        print(f"bench.py: error: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
