"""As ptxas_report, of the grouped products of mixtures: ``python -m tests.kernels.groups_report``, as JSON."""

from __future__ import annotations

import json
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import gpu_gemm
from jaxserve.kernels.backend import Target
from tests.kernels.ptxas_report import Resources, compile_launch, launched


class Case(NamedTuple):
    num_rows: int
    """Of a batch."""
    per_token: int
    num_experts: int
    hidden: int
    inner: int
    gate: str | None = "silu"


CASES = {
    "decodes, Qwen3-30B-A3B": Case(32, 8, 128, 2048, 768),
    "chunks, Qwen3-30B-A3B": Case(2048, 8, 128, 2048, 768),
    "chunks, Mixtral": Case(2048, 2, 8, 4096, 14336),
    "chunks, gpt-oss-20b": Case(2048, 4, 32, 2880, 2880, None),
}


def compiled(case: Case) -> list[Resources]:
    """The gated product and the one behind it, for Hopper."""
    target, pairs = Target("gpu", 90, 132), case.num_rows * case.per_token

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    product = partial(gpu_gemm.multiply, out_dtype=jnp.dtype("bfloat16"), target=target)
    rows, sizes = (array(size, dtype="int32") for size in (pairs, case.num_experts))
    x, gate_up = array(case.num_rows, case.hidden), array(2, case.num_experts, case.hidden, case.inner)
    inner, down = array(pairs, case.inner), array(case.num_experts, case.inner, case.hidden)
    found = launched(lambda *arrays: product(*arrays, gate=case.gate), x, gate_up, rows, sizes)
    found += launched(lambda x, w, sizes: product(x, w, None, sizes, gate=None), inner, down, sizes)
    return [compile_launch(launch, target.compute_capability) for launch in found]


if __name__ == "__main__":
    print(json.dumps({name: [kernel.to_json() for kernel in compiled(case)] for name, case in CASES.items()}))
