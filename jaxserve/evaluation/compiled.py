"""What XLA and Triton made of a program, read from what they say about it."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax


class Launches(NamedTuple):
    """What a GPU's host launches for one run of a program, by itself or by replaying a CUDA graph."""

    num_graphs: int
    """CUDA graphs, XLA's command buffers. One for everything costs the host the same whatever it holds."""
    num_others: int
    """Kernels, copies, collectives and branches outside of all graphs."""
    num_waits: int
    """Of those, branches and loops: the host waits until the device knows the way."""


def compile_and_explain(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Launches]:
    """Compile, never from the persistent cache; the launches of a GPU's program."""
    with tempfile.TemporaryDirectory() as folder:
        # The cache does not tell programs apart by where they are dumped, but it does by this pattern of nothing.
        compiled, text = _compile_into(folder, lowered, xla_dump_emitter_re=Path(folder).name)
    return compiled, count_launches(text or "")


def compile_into_cache(lowered: jax.stages.Lowered) -> Launches | None:
    """Compile for whoever needs the same program next in this process or another, through the persistent cache; the
    launches of a GPU's program, None where it was in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        _, text = _compile_into(folder, lowered)
    return None if text is None else count_launches(text)


def _compile_into(folder: str, lowered: jax.stages.Lowered, **options: str) -> tuple[jax.stages.Compiled, str | None]:
    """With XLA's list of thunks, if it wrote one into ``folder``."""
    compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True, **options})
    # After the passes that make graphs, if they made any: that name comes last.
    texts = [path.read_text() for path in sorted(Path(folder).glob("*.thunk_sequence*.txt"))]
    return compiled, texts[-1] if texts else None


def count_launches(thunks: str) -> Launches:
    """Of XLA's list of thunks, one a line, those within a graph or a branch indented."""
    kinds = Counter(re.findall(r"^\d+: (k\w+)", thunks, re.MULTILINE))
    num_others = kinds.total() - kinds["kCommandBuffer"] - kinds["kAsyncDone"]
    return Launches(thunks.count("kCommandBuffer"), num_others, kinds["kConditional"] + kinds["kWhile"])


class Instruction(NamedTuple):
    """One of a compiled program's."""

    name: str
    types: list[tuple[str, tuple[int, ...]]]
    """Of its results: element type and shape."""
    opcode: str
    operands: list[tuple[str, int | None]]
    """By name; of a tuple, the number of the element that is meant."""
    text: str
    """As XLA writes it, with what it is made of."""

    @property
    def is_launched(self) -> bool:
        """Whether the device does something for it."""
        return self.opcode not in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "opt-barrier")


_ELEMENT_BYTES = {"pred": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
"""Without s8, which is the type of cuBLAS's workspaces."""
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_TYPE = re.compile(rf"\b({'|'.join(_ELEMENT_BYTES)})\[([\d,]*)\]")


def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """Of a compiled program: their instructions by name, by the computation's name. The program itself is ENTRY."""
    found: dict[str, dict[str, Instruction]] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:(ENTRY) )?%([\w.\-]+) \(.*\{$", line):
            current = found[header[1] or header[2]] = {}
        elif match := _INSTRUCTION.match(line):
            name, types, opcode, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)(?:#(\d+))?", re.split(r"\), |\)$", rest)[0])
            current[name] = Instruction(
                name, _types(types), opcode, [(of, int(part) if part else None) for of, part in operands], line
            )
    return found


def num_rematerialized(text: str) -> int:
    """Instructions that compute again what has been computed, for want of memory."""
    return len(re.findall(r"^\s+(?:ROOT )?%[\w.\-]*\.remat", text, re.MULTILINE))


def num_launched(text: str, scope: str = "") -> int:
    """Kernels and other nodes of a program's graph; ``scope`` as in ``collectives``."""
    return sum(each.is_launched and scope in each.text for each in computations(text)["ENTRY"].values())


def moved_bytes(computation: Mapping[str, Instruction], *, without: int | None = None) -> int:
    """What instructions read and write, taking each for one that reads its operands and writes its results once.

    Loops and branches are left out, and arrays whose first dimension is ``without``, such as the KV cache's: a kernel
    that takes them does not touch all.
    """
    total = 0
    for each in computation.values():
        if each.is_launched and each.opcode not in ("while", "conditional"):
            read = [
                one
                for name, part in each.operands
                if name in computation
                for one in (computation[name].types if part is None else computation[name].types[part : part + 1])
            ]
            total += sum(_num_bytes(*one) for one in (*read, *each.types) if one[1][:1] != (without,))
    return total


def _types(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in _TYPE.findall(text)]


def _num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return _ELEMENT_BYTES[kind] * math.prod(shape)


def num_copies(text: str, shape: tuple[int, ...]) -> int:
    """Copies and transpositions of arrays of ``shape`` in a compiled program's text."""
    sizes = ",".join(map(str, shape))
    kinds = rf"\w+\[{sizes}\]\S* (?:copy|transpose)", rf"\(\w+\[{sizes}\][^=]*\) copy-start"
    return len(re.findall(rf" = (?:{'|'.join(kinds)})\(", text))


def collectives(text: str, scope: str = "") -> Counter[str]:
    """How often a compiled program has which collective, such as all-reduce; asynchronous ones count where they start.

    ``scope``: only where this is in the operation's name, such as the name of the jitted function that it is from.
    """
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    return Counter(re.findall(rf" ({names})(?:-start)?\(.*{re.escape(scope)}", text))


def custom_calls(text: str) -> Counter[str]:
    """How often a compiled program calls what, by the call's target."""
    return Counter(re.findall(r'custom_call_target="([^"]+)"', text))


def triton_assembler() -> Path | None:
    """The newest assembler that Triton brings, if it is installed. It takes what Triton's own compiler writes."""
    try:
        from triton.backends import nvidia  # an extra
    except ImportError:
        return None
    tools = Path(nvidia.__path__[0], "bin")
    return next((path for name in ("ptxas-blackwell", "ptxas") if (path := tools / name).exists()), None)


class KernelResources(NamedTuple):
    """What one Triton kernel takes of a multiprocessor."""

    name: str
    num_warps: int
    num_registers: int
    """Of each thread."""
    spilled_bytes: int
    """What each thread stores for want of registers."""
    shared_bytes: int


def kernel_resources(folder: Path, assembler: Path, architecture: str) -> Iterator[KernelResources]:
    """Of the kernels that jax-triton has compiled into ``folder``, its JAX_TRITON_DUMP_DIR, in any order."""
    for path in folder.rglob("*.ptx"):
        command = [str(assembler), "-v", "--gpu-name", architecture, str(path), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        said += path.read_text() + path.with_suffix(".compile_info").read_text()
        threads, registers, spilled, shared = (
            _number_after(pattern, said)
            for pattern in (r"\.(?:req|max)ntid ", r"Used ", r"bytes stack frame, ", r"shared_mem_bytes: ")
        )
        yield KernelResources(path.stem, threads // 32, registers, spilled, shared)


def _number_after(pattern: str, text: str) -> int:
    found = re.search(rf"{pattern}(\d+)", text)
    if found is None:
        raise ValueError(f"no {pattern!r} and a number in the assembler's report: {text[:500]}")
    return int(found[1])
