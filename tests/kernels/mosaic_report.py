"""What the Mosaic prefill kernel asks of a Hopper GPU, found by compiling it without one.

``python -m tests.kernels.mosaic_report`` prints a table of registers, spills, shared memory and matrix instructions for
each variant, or JSON with ``--json``. Not for a process whose jax has only the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.evaluation.aot import DEVICES, absent_mesh
from jaxserve.evaluation.attention_variants import MISTRAL, Variant
from jaxserve.kernels.mosaic_prefill import paged_prefill
from jaxserve.kernels.reach import Reach
from tests.kernels.variants import ROWS, cache_and_inputs

VARIANTS = {
    "bfloat16 32/8 x 128": MISTRAL,
    "float16": replace(MISTRAL, dtype="float16", cache_dtype="float16"),
    "window": replace(MISTRAL, window=4096),
    "soft cap": replace(MISTRAL, softcap=50.0),
    "window, soft cap": replace(MISTRAL, window=4096, softcap=50.0),
    "group 1": replace(MISTRAL, kv_heads=32),
    "group 5": replace(MISTRAL, heads=40),
    "group 8": replace(MISTRAL, heads=64),
    "32/8 x 64": replace(MISTRAL, head_dim=64),
    "64/8 x 64, window, sinks": replace(MISTRAL, heads=64, head_dim=64, window=128, has_sinks=True),
    "40/8, chunks": replace(MISTRAL, heads=40, chunk=8192),
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel."""

    registers: int
    """Of each thread, before warpgroups trade them."""
    spilled_bytes: int
    """By each thread, stores and loads."""
    shared_bytes: int
    wgmma: int
    """Matrix instructions of warpgroups, in the program text."""


def compile_variant(variant: Variant) -> Resources:
    sharding = NamedSharding(absent_mesh(DEVICES["h100"]), PartitionSpec())
    cache, inputs = cache_and_inputs(variant, "mosaic", sharding)
    q = jax.ShapeDtypeStruct((ROWS, variant.heads, variant.head_dim), cache.k.dtype, sharding=sharding)
    layer = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)
    sinks = jax.ShapeDtypeStruct((variant.heads,), jnp.float32, sharding=sharding) if variant.has_sinks else None
    with dumped() as texts:
        attend = partial(
            paged_prefill,
            scale=variant.head_dim**-0.5,
            reach=Reach(variant.window, variant.chunk),
            softcap=variant.softcap,
        )
        jax.jit(attend).lower(q, cache, inputs, layer, sinks).compile()
        ptx, log, sizes = (next(texts.glob(f"*.{kind}")).read_text() for kind in ("ptx", "ptxas", "resources.txt"))
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (properties,) = re.findall(r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    (shared_bytes,) = re.findall(r"smem_scratch_bytes=(\d+)", sizes)
    return Resources(int(registers), sum(map(int, properties)), int(shared_bytes), ptx.count("wgmma.mma_async"))


@contextmanager
def dumped() -> Iterator[Path]:
    """A folder with what Mosaic writes about kernels that are compiled meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        yield Path(folder)
        del os.environ["MOSAIC_GPU_DUMP_TO"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    found = {name: compile_variant(variant) for name, variant in VARIANTS.items()}
    if parser.parse_args().json:
        print(json.dumps({name: asdict(kernel) for name, kernel in found.items()}))
        return
    print("| variant | registers | bytes spilled | shared bytes | wgmma |")
    print("|---|---|---|---|---|")
    for name, kernel in found.items():
        print(f"| {name} | {' | '.join(map(str, astuple(kernel)))} |")


if __name__ == "__main__":
    main()
