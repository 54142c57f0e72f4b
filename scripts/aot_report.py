"""Compile the engine's step programs for a GPU on a machine without one, and say what came out.

aot_report.py --device h100 --model mistral-7b --token-budget 2048 --output report.json
aot_report.py --model falcon-180b --max-model-len 2048 --tensor-parallel 4 --pipeline-parallel 2 --hosts 2

For every token bucket: whether the KV cache is changed in place, temporary memory, kernels a layer, what they move over
what the weights take (the KV cache left out), CUDA graphs, collectives; and the
registers that the kernels take. Bytes are those of one device. Needs XLA's CUDA plugin and jax-triton: make aot.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# Read when jax is imported. With JAX_PLATFORMS=cpu, say, jax would not look for the CUDA plugin, which without a GPU
# needs to be told that none of CUDA's libraries is expected.
os.environ.pop("JAX_PLATFORMS", None)
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

MIB = 2**20
DEFAULTS = {
    "model": "mistral-7b", "load_format": "dummy", "dtype": "bfloat16", "attention_backend": "triton",
    "token_budget": 2048, "max_num_seqs": 128, "max_model_len": 8192,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--device", choices=("h100", "h200"), default="h100", help="what to compile for")
    parser.add_argument("--hosts", type=int, default=1, help="that the stages of a pipeline are divided over")
    parser.add_argument("--rows", nargs="+", type=int, help="only these token buckets")
    kinds = ("forward", "sample")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="only these programs of a step")
    parser.add_argument("--output", type=Path, help="file for all of it as JSON")
    config, args = parse_config(parser, argv, EngineConfig)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return report(config, args, Path(folder))
        except ValueError as error:  # ConfigError, ModelError
            print(f"aot_report: error: {error}", file=sys.stderr)
            return 2


def report(config: EngineConfig, args: argparse.Namespace, folder: Path) -> int:
    from jaxserve.engine.programs import StepPrograms
    from jaxserve.evaluation.aot import DEVICES, absent_mesh, compile_forward, compile_sample
    from jaxserve.evaluation.compiled import kernel_resources, triton_assembler
    from jaxserve.evaluation.report import text_table
    from jaxserve.models.loading.checkpoint import open_checkpoint
    from jaxserve.models.rope import longest_sequence

    assembler = triton_assembler()
    if assembler is not None:
        # XLA takes the first on the path, which may be older than what Triton writes for its own.
        (folder / "ptxas").symlink_to(assembler)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    os.environ["JAX_TRITON_DUMP_DIR"] = str(folder)  # read when jax_triton is imported, by the first kernel
    device = DEVICES[args.device]
    model = open_checkpoint(config.model, config.load_format).config
    resolved = config.resolve(model_max_len=longest_sequence(model), on_gpu=True)
    mesh = absent_mesh(device, config.tensor_parallel, config.pipeline_parallel, args.hosts)
    gpu_memory_bytes = int(device.memory_bytes * config.gpu_memory_utilization)
    programs = StepPrograms(resolved, model, mesh, target=device.target, gpu_memory_bytes=gpu_memory_bytes)
    unknown = set(args.rows or ()) - set(programs.buckets)
    if unknown:
        known = ", ".join(map(str, programs.buckets))
        raise ConfigError(f"rows must be token buckets ({known}), got {min(unknown)}")
    print(f"{config.model} on {mesh.size} x {device.name}: {programs.backend.name} attention, "
          f"{programs.num_blocks} KV blocks of {resolved.block_size}, {resolved.max_num_seqs} sequences of "
          f"{resolved.max_model_len} tokens")  # fmt: skip
    reports = []
    buckets = args.rows or programs.buckets
    draws = sorted({programs.layouts[rows].num_draws for rows in buckets})
    sizes = {"forward": (compile_forward, buckets), "sample": (compile_sample, draws)}
    for compile_program, rows in ((sizes[kind][0], size) for kind in args.kinds for size in sizes[kind][1]):
        reports.append(compile_program(programs, rows))
        print(f"  {reports[-1].kind} {rows} compiled in {reports[-1].compile_seconds:.1f} s", flush=True)
    architecture = f"sm_{device.target.compute_capability}a"
    resources = [] if assembler is None else sorted(set(kernel_resources(folder, assembler, architecture)))
    print(text_table([
        {
            "program": f"{r.kind} {r.rows}",
            "lower s": f"{r.lower_seconds:.1f}",
            "compile s": f"{r.compile_seconds:.1f}",
            "arguments MiB": f"{r.argument_bytes / MIB:.0f}",
            "aliased MiB": f"{r.alias_bytes / MIB:.0f}",
            "not aliased": str(r.donated_bytes - r.alias_bytes),
            "temp MiB": f"{r.temp_bytes / MIB:.1f}",
            "cache copies": str(r.num_cache_copies),
            "rematerialized": str(r.num_rematerialized),
            "kernels per layer": f"{r.num_layer_kernels / r.num_layers:.1f}",
            "moved / weights": f"{r.moved_bytes / r.weight_bytes:.2f}",
            "CUDA graphs": str(r.launches.num_graphs),
            "other launches": str(r.launches.num_others),
            "waits": str(r.launches.num_waits),
            "collectives": counts(r.collectives),
            "per layer": counts(r.collectives_per_layer),
            "triton calls": str(r.calls("triton")),
            "mosaic calls": str(r.calls("mosaic")),
        }
        for r in reports
    ]))  # fmt: skip
    if resources:
        print(text_table([{name: str(value) for name, value in r._asdict().items()} for r in resources]))
    if args.output is not None:
        everything = {
            "device": device._asdict(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "triton", "jax-triton")},
            "hosts": [[device.process_index for device in stage] for stage in mesh.devices],
            "settings": vars(resolved) | {"num_blocks": programs.num_blocks, "max_drafts": resolved.max_drafts},
            "programs": [dataclasses.asdict(r) | {"launches": r.launches._asdict()} for r in reports],
            "kernels": [r._asdict() for r in resources],
        }
        args.output.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return 0


def counts(of_what: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {what}" for what, count in sorted(of_what.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
