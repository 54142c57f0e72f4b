"""Compiles an engine's step programs for a GPU that is not there, and reports what came out.

XLA's CUDA plugin compiles for a described device: everything but the choice of GEMM algorithms, which it measures on a
real one.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.engine.programs import StepPrograms
from jaxserve.errors import ConfigError
from jaxserve.evaluation.compiled import (
    Launches,
    collectives,
    compile_and_explain,
    computations,
    custom_calls,
    moved_bytes,
    num_copies,
    num_launched,
    num_rematerialized,
)
from jaxserve.kernels.backend import Target

DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {num_cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bytes_per_second}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory_bytes}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""
"""XLA's GpuTargetConfigProto of a Hopper. Without a driver version it makes no CUDA graphs."""


class AbsentDevice(NamedTuple):
    name: str
    num_cores: int
    bytes_per_second: int
    memory_bytes: int

    @property
    def target(self) -> Target:
        return Target("gpu", 90, self.num_cores)


DEVICES = {
    "h100": AbsentDevice("NVIDIA H100 80GB HBM3", 132, 3352320000000, 84929347584),
    "h200": AbsentDevice("NVIDIA H200", 132, 4800000000000, 150754820096),
}


def absent_mesh(device: AbsentDevice, tensor: int = 1, pipe: int = 1, hosts: int = 1) -> Mesh:
    """A mesh of such devices, to compile for, each stage of a pipeline on one host.

    Raises ConfigError where the stages do not divide over the hosts, and without XLA's CUDA plugin.
    """
    if hosts < 1 or pipe % hosts:
        raise ConfigError(f"hosts must divide the {pipe} stages of pipeline_parallel, got {hosts}")
    if importlib.util.find_spec("jax_cuda13_plugin") is None and importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ConfigError(
            'compiling for a GPU needs XLA\'s CUDA plugin, which is not installed here; make aot ARGS="--model ..." '
            "brings it and runs scripts/aot_report.py with it"
        )
    description = DESCRIPTION.format(**device._asdict())
    shape = f"1x{hosts}x{pipe // hosts * tensor}"  # slices, hosts of each, devices of each
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=shape)
    return topologies.make_mesh(topology, (pipe, tensor), ("pipe", "tensor"))


@dataclass(frozen=True)
class ProgramReport:
    """A compiled program of a step; bytes are those of one device. Temporary memory is what it needs besides its
    arguments and results.
    """

    kind: str
    """``forward`` or ``sample``"""
    rows: int
    """Of the batch; draws, where it samples."""
    lower_seconds: float
    compile_seconds: float
    argument_bytes: int
    donated_bytes: int
    """The device's state, mostly the KV cache: what it should change in place."""
    alias_bytes: int
    """What it does change in place."""
    temp_bytes: int
    num_cache_copies: int
    num_rematerialized: int
    """Instructions that compute again what could be kept."""
    moved_bytes: int
    """Read and written by kernels, by the shapes of what they take and give, without the KV cache."""
    num_layer_kernels: int
    """Of all layers."""
    launches: Launches
    num_layers: int
    """Of one stage."""
    collectives: Mapping[str, int]
    layer_collectives: Mapping[str, int]
    """Of all layers."""
    custom_calls: Mapping[str, int]
    """By target: kernels, and library calls."""

    def calls(self, kind: str) -> int:
        """Custom calls whose target has ``kind`` in its name."""
        return sum(count for target, count in self.custom_calls.items() if kind in target)

    @property
    def weight_bytes(self) -> int:
        """And what else comes with it, which is little."""
        return self.argument_bytes - self.donated_bytes

    @property
    def collectives_per_layer(self) -> dict[str, float]:
        return {kind: count / self.num_layers for kind, count in self.layer_collectives.items()}


def compile_forward(programs: StepPrograms, rows: int) -> ProgramReport:
    """The forward pass of a token bucket."""
    return _compile(programs, "forward", rows, partial(programs.lower_forward, rows), programs.abstract_state())


def compile_sample(programs: StepPrograms, num_draws: int) -> ProgramReport:
    lower = partial(programs.lower_sample, num_draws)
    return _compile(programs, "sample", num_draws, lower, programs.abstract_sequences())


def _compile(
    programs: StepPrograms, kind: str, rows: int, lower: Callable[[], jax.stages.Lowered], donated: object
) -> ProgramReport:
    start = time.perf_counter()
    lowered = lower()
    lowered_seconds = time.perf_counter()
    compiled, launches = compile_and_explain(lowered)
    compiled_seconds = time.perf_counter()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    pages = _shard(programs.abstract_state().cache.k)
    return ProgramReport(
        kind=kind,
        rows=rows,
        lower_seconds=lowered_seconds - start,
        compile_seconds=compiled_seconds - lowered_seconds,
        argument_bytes=memory.argument_size_in_bytes,
        donated_bytes=sum(math.prod(_shard(array)) * array.dtype.itemsize for array in jax.tree.leaves(donated)),
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        num_cache_copies=num_copies(text, pages),
        num_rematerialized=num_rematerialized(text),
        moved_bytes=moved_bytes(computations(text)["ENTRY"], without=pages[0]),
        num_layer_kernels=num_launched(text, "run_layer"),
        launches=launches,
        num_layers=programs.kv_cache.num_layers // programs.num_stages,
        collectives=dict(collectives(text)),
        layer_collectives=dict(collectives(text, "run_layer")),
        custom_calls=dict(custom_calls(text)),
    )


def _shard(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """What one device holds of it."""
    assert array.sharding is not None
    return array.sharding.shard_shape(array.shape)
