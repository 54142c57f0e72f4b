"""Which of a layer's attention kernels wait for which, in the program that XLA makes for an H100 on any machine.

``python -m tests.kernels.overlap_report`` prints, as JSON, for each kernel those that it depends on, directly or not.
"""

from __future__ import annotations

import json
import os
import re

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # read when jax is imported

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.evaluation.aot import DEVICES, absent_mesh
from jaxserve.evaluation.attention_variants import VARIANTS
from tests.kernels.ptxas_report import program

READS = {
    "rotate_and_write": "inputs_slots",
    "prefill": "plan_prefill",
    "decode": "plan_decode",
    "combine": "plan_combine",
}
"""The argument that only this kernel has."""


def dependencies(text: str) -> dict[str, list[str]]:
    """Of a compiled program's text."""
    operands: dict[str, list[str]] = {}
    for name, call in re.findall(r"^\s+(?:ROOT )?(%[\w.]+) = (.*)$", text[text.index("\nENTRY") :], re.MULTILINE):
        operands[name] = re.findall(r"%[\w.]+", re.sub(r", (?:metadata|backend_config)=.*", "", call))

    def needed(name: str) -> set[str]:
        found = set(operands.get(name, []))
        return found.union(*map(needed, found))

    calls = {
        kernel: name
        for kernel, argument in READS.items()
        for name, read in operands.items()
        if any(argument in operand for operand in read) and "triton_kernel_call" in name
    }
    return {kernel: [other for other in calls if calls[other] in needed(calls[kernel])] for kernel in calls}


def main() -> None:
    sharding = NamedSharding(absent_mesh(DEVICES["h100"]), PartitionSpec())
    function, *arguments = program(VARIANTS["window"], "triton")
    arguments = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), arguments)
    compiled = jax.jit(function, donate_argnums=2).lower(*arguments).compile()
    text = compiled.as_text()
    assert text is not None
    print(json.dumps(dependencies(text)))


if __name__ == "__main__":
    main()
