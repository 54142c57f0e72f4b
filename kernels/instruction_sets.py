"""Which of a CPU's instruction sets the native kernels are compiled for: the fastest that the processor has.

One cache folder may serve several machines: a library for each set lies in it, built by the first that wants it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from jaxserve.errors import ConfigError

VARIABLE = "JAXSERVE_CPU_ISA"
"""Forces a set by its name, to compare or to test."""
INTEL = "GenuineIntel"
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
"""Linux's system call on x86-64, and its arguments (asm/prctl.h, asm/fpu/types.h)."""


class Processor(NamedTuple):
    vendor: str
    """As in /proc/cpuinfo: GenuineIntel, AuthenticAMD, or empty."""
    features: frozenset[str]
    """Its flags there, without underscores."""

    @classmethod
    def here(cls) -> Self:
        """Linux's word for it; of other systems nothing is known."""
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = fields.get("flags", "").split()
        return cls(fields.get("vendor_id", ""), frozenset(flag.replace("_", "") for flag in flags))


@dataclass(frozen=True)
class InstructionSet:
    name: str
    features: tuple[str, ...] = ()
    """What a processor must have, as compilers' -m options spell it."""
    options: tuple[str, ...] = ()
    """Of the compiler besides."""
    slow_on: str = ""
    """The vendor on whose processors the next set is faster."""

    @property
    def flags(self) -> list[str]:
        """The compiler's. Nothing is native: results shall not depend on the machine that a library was built on."""
        return [*(f"-m{feature}" for feature in self.features), *self.options]

    def runs_on(self, processor: Processor) -> bool:
        if not {feature.replace("-", "") for feature in self.features} <= processor.features:
            return False
        return "amx-tile" not in self.features or tiles_are_permitted()


def tiles_are_permitted() -> bool:
    """Whether Linux lets this process use AMX's registers, which it must ask for once, for all its threads
    (Documentation/arch/x86/xstate.rst)."""
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


GENERIC = InstructionSet("generic")
# Sums wait for an FMA longer than for an addition on AMD's Zen 2 and 3, the processors of servers that end here, so
# compilers make two instructions of some where they are told; which they are decides the last bit.
AVX2 = InstructionSet("avx2", ("avx2", "fma", "f16c"), ("-mtune=znver2",))
AVX512 = InstructionSet("avx512", (*AVX2.features, *(f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl"))))
AVX512_VNNI = InstructionSet("avx512_vnni", (*AVX512.features, "avx512vnni"))
# vdpbf16ps does on Intel half the operations of a float32 FMA, on AMD (Zen 4, Zen 5) twice as many.
AVX512_BF16 = InstructionSet("avx512_bf16", (*AVX512_VNNI.features, "avx512bf16"), slow_on=INTEL)
# Every processor with AMX has the vectors of bfloat16 too, of which the kernels take the conversion alone.
AMX = InstructionSet("amx", (*AVX512_BF16.features, "amx-tile", "amx-bf16", "amx-int8"))
# The kernels for AMX, its instructions in plain C++ (cpu_tiles.h), for tests.
AMX_EMULATED = InstructionSet("amx_emulated", AVX2.features, ("-DJAXSERVE_EMULATED_TILES",))
BEST_FIRST = AMX, AVX512_BF16, AVX512_VNNI, AVX512, AVX2, GENERIC
FORCED_ONLY = (AMX_EMULATED,)


def candidates(processor: Processor, forced: str = "") -> Sequence[InstructionSet]:
    """Those that a processor runs and that are fast on it, best first: all but the first are for compilers that do not
    know it. ``forced``: the name of the only one. Raises ConfigError where the processor does not run that.
    """
    running = [one for one in (*BEST_FIRST, *FORCED_ONLY) if one.runs_on(processor)]
    if not forced:
        return [one for one in running if one in BEST_FIRST and not (one.slow_on and one.slow_on == processor.vendor)]
    if chosen := [one for one in running if one.name == forced]:
        return chosen
    names = ", ".join(one.name for one in running)
    raise ConfigError(f"{VARIABLE} must be a set of instructions that this processor runs: {names}, got {forced!r}")


def candidates_here() -> Sequence[InstructionSet]:
    """For this process. Raises ConfigError, see ``candidates``."""
    return candidates(Processor.here(), os.environ.get(VARIABLE, ""))
