"""What the Triton kernels ask of a GPU, found by compiling them without one: ``python -m tests.kernels.ptxas_report``.

Prints a table of registers, spills, shared memory and instructions for each kernel of each variant, or JSON with
``--json``. Not for a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from jaxserve.evaluation.attention_variants import VARIANTS, Variant
from jaxserve.kernels import triton_launch
from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from tests.kernels.variants import ROWS, cache_and_inputs

TRITON_TYPES = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "float8_e4m3fn": "*fp8e4nv",
    "int32": "*i32",
}

COMPILED = {name: (variant, "triton") for name, variant in VARIANTS.items()} | {
    "window, 2 prefill programs": (VARIANTS["window"], "triton, 2 prefill programs"),
    "window, pod": (VARIANTS["window"], "pod"),
}
"""Variants, and which of gpu_variants computes them."""


@dataclass(frozen=True)
class Launch:
    """What triton_call was asked to launch."""

    kernel: Any
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    backend_options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    """Of one kernel."""

    kernel: str
    num_warps: int
    registers: int
    """Of each thread."""
    spilled_bytes: int
    """By each thread, stores and loads."""
    shared_bytes: int
    wgmma: int
    """Matrix instructions of warpgroups, in the program text."""
    mma: int
    """Matrix instructions of warps."""
    loops: tuple[int, ...]
    """Instructions of each loop that multiplies matrices: one step for each tile of keys."""
    local_accesses: int
    """Instructions that access a thread's own memory, which is where spilled registers are."""

    @property
    def core_registers(self) -> int:
        """Of a multiprocessor, for one program: warps get them 256 at a time."""
        return -(-32 * self.registers // 256) * 256 * self.num_warps

    @property
    def occupancy(self) -> int:
        """Programs that a multiprocessor of Hopper runs at once; each takes 1 KiB of shared memory besides its own."""
        return min(65536 // self.core_registers, 228 * 1024 // (self.shared_bytes + 1024))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"core_registers": self.core_registers, "occupancy": self.occupancy}


def launches(variant: Variant, backend: str) -> list[Launch]:
    """What the step program of a model launches for one layer."""
    return launched(*program(variant, backend))


def launched(function: Callable[..., Any], *shapes: Any) -> list[Launch]:
    """By a function of arrays of such shapes."""
    found: list[Launch] = []

    def triton_call(
        *args: Any,
        kernel: Any,
        out_type: Any,
        grid: tuple[int, ...],
        input_output_aliases: dict[int, int],
        compute_capability: int,
        num_warps: int,
        backend_options: dict[str, Any],
        name: str = "",
        **constants: Any,
    ) -> Any:
        outputs = jax.tree.leaves(out_type)
        unaliased = [out for i, out in enumerate(outputs) if i not in input_output_aliases.values()]
        names = [parameter for parameter in kernel.arg_names if parameter not in constants]
        given = dict(zip(names, [*args, *unaliased], strict=True))
        constants |= {parameter: None for parameter, arg in given.items() if arg is None}
        types = {parameter: TRITON_TYPES[str(arg.dtype)] for parameter, arg in given.items() if arg is not None}
        signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
        options = tuple(backend_options.items())
        label = name or kernel.__name__
        found.append(Launch(kernel, label, (*signature.items(),), (*constants.items(),), num_warps, options))
        return jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), out_type)

    with mock.patch.object(triton_launch, "triton_call", triton_call):
        jax.eval_shape(function, *shapes)
    return found


def program(variant: Variant, backend: str) -> tuple[Any, ...]:
    """One layer's attention as a function of (qkv, rotation, cache, inputs, layer, sinks), and the shapes of these."""
    cache, inputs = cache_and_inputs(variant, backend)

    def layer(
        qkv: jax.Array,
        rotation: Any,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        q, cache = rotate_and_write(qkv, rotation, cache, inputs, layer)
        return paged_attention(q, cache, inputs, layer, **variant.masking, sinks=sinks), cache

    width = variant.heads // variant.kv_heads + 2
    qkv = jax.ShapeDtypeStruct((ROWS, variant.kv_heads, width, variant.head_dim), variant.dtype)
    table = jax.ShapeDtypeStruct((ROWS, variant.rotated // 2), np.float32)
    rotation = (table, table) if variant.rotated else None
    sinks = jax.ShapeDtypeStruct((variant.heads,), np.float32) if variant.has_sinks else None
    return layer, qkv, rotation, cache, inputs, jax.ShapeDtypeStruct((), np.int32), sinks


def compile_launch(launch: Launch, capability: int) -> Resources:
    """By Triton, and by ptxas with XLA's options: Triton's own have one that XLA's lack."""
    signature = dict(launch.signature)
    pointers = [i for i, kind in enumerate(signature.values()) if kind != "constexpr"]
    source = ASTSource(
        launch.kernel, signature, dict(launch.constants), {(i,): [["tt.divisibility", 16]] for i in pointers}
    )
    options = {"num_warps": launch.num_warps, **dict(launch.backend_options)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        architecture = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(path), "-o", f"{path}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        disassemble = [str(Path(command[0]).with_name("cuobjdump")), "-sass", f"{path}.cubin"]
        sass = subprocess.run(disassemble, check=True, capture_output=True, text=True).stdout
    (registers,) = re.findall(r"Used (\d+) registers", log)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return Resources(
        launch.name, launch.num_warps, int(registers), spilled, compiled.metadata.shared,
        ptx.count("wgmma.mma_async"), ptx.count("mma.sync"), matrix_loops(sass),
        len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    )  # fmt: skip


def matrix_loops(sass: str) -> tuple[int, ...]:
    """Instructions of each innermost loop, that is from the target of a branch backwards, that multiplies matrices."""
    code = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    places = [place for place, _ in code]
    loops = []
    for end, (place, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < place:
            loops.append(range(places.index(int(target[1], 16)), end + 1))
    innermost = [
        loop for loop in loops if not any(other != loop and other[0] in loop and other[-1] in loop for other in loops)
    ]
    return tuple(len(loop) for loop in innermost if any(re.search(r"\bHG?MMA\b", code[i][1]) for i in loop))


def report(variants: dict[str, tuple[Variant, str]]) -> dict[str, list[Resources]]:
    """The resources of each variant's kernels; those that are equal are compiled once."""
    known: dict[tuple[Launch, int], Resources] = {}
    found: dict[str, list[Resources]] = {}
    for name, (variant, backend) in variants.items():
        found[name] = []
        for launch in launches(variant, backend):
            key = launch, variant.capability
            if key not in known:
                known[key] = compile_launch(*key)
            found[name].append(known[key])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variants", nargs="+", default=COMPILED)
    arguments = parser.parse_args()
    found = report({name: COMPILED[name] for name in arguments.variants})
    if arguments.json:
        print(json.dumps({name: [kernel.to_json() for kernel in kernels] for name, kernels in found.items()}))
        return
    print(f"Triton {triton.__version__}, for sm_90a.\n")
    print("| variant | kernel | warps | registers | bytes spilled | shared bytes | wgmma | mma | loops | local |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, kernels in found.items():
        for kernel in kernels:
            print(f"| {name} | {' | '.join(map(str, astuple(kernel)))} |")


if __name__ == "__main__":
    main()
