"""Attention kernels alone on a GPU: are they right, how long do they take, and how far are they from the ceilings.

Variants of a case change one thing each: page size, type of the KV cache, or how the batch is cut.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.errors import ConfigError
from jaxserve.evaluation.attention_batch import (
    LEAST_CACHE_BYTES,
    attention_chain,
    attention_error,
    attention_work,
    random_batch,
    rotation_chain,
    rotation_error,
    rotation_work,
)
from jaxserve.evaluation.device_bench import (
    QUICK,
    THOROUGH,
    Ceilings,
    Effort,
    Timing,
    Work,
    measure_ceilings,
    time_launches,
    write_results,
)
from jaxserve.kernels.backend import AttentionShape, Backend, Target
from jaxserve.kernels.registry import GPU_BACKENDS, choose_backend

BACKENDS = (*GPU_BACKENDS, "xla")
BFLOAT16, FLOAT8 = jnp.dtype("bfloat16"), jnp.dtype(jnp.float8_e4m3fn)
SHAPE = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, page_size=64, dtype=BFLOAT16, cache_dtype=BFLOAT16)
"""Of Mistral-7B and Llama-3-8B."""
TINY_SHAPE = SHAPE._replace(num_heads=4, num_kv_heads=2, head_dim=16)
NUM_CALLS = 16
MOST_THREADS = 8
"""Each holds a random cache of up to 4 GB on the device."""
WINDOW = 4096
"""Mistral-7B's. Kernels with a window are other ones: they mask every tile."""
MOST_ERROR = 1e-2
"""What bfloat16 operands cost a right kernel lies between 1e-3 and this."""
METHOD = (
    "Every row is checked first, on fresh random inputs, against dense attention in float64: error is "
    "||out - reference|| / ||reference||; outputs are poisoned with NaN before. Then it is timed: a program runs the "
    f"kernels {NUM_CALLS} times in a row, each call in another layer of a cache larger than the L2 cache and with the "
    "output of the call before as its queries (rotations: with other rows, into the cache that the call before wrote), "
    "and is launched again and again without a wait for at least 50 ms; a call's time is the wall time by the number "
    "of calls, the median of up to 20 such measurements. Spread is longest - shortest by median. Nothing is "
    "subtracted. GB/s and TFLOP/s count what the task needs at least: every key and value once, queries, outputs; "
    "two operations for each multiplication of a query with a visible key, and of a weight with its value. The floor "
    "is the longer of the two at the ceilings. First and stretch are what an H100 should reach; apart is what the "
    "parts of a hybrid batch take in batches of their own."
)


class Bounds(NamedTuple):
    """What a kernel should reach, in seconds."""

    first: float
    stretch: float


@dataclass(frozen=True)
class Case:
    name: str
    sequences: tuple[tuple[int, int], ...]
    """(context, query rows) of each."""
    seconds: Bounds | None = None
    flops_per_second: tuple[float, float] | None = None
    sum_of: tuple[str, str] | None = None
    """The cases that this one has in one batch: it should take less time than both."""
    swept: bool = False
    """Also with other page sizes and cache types."""
    rotates: bool = False
    """Times rotate_and_write instead of attention."""

    @property
    def kind(self) -> str:
        """One of kernels.backend.BATCH_KINDS."""
        decodes = [rows == 1 for _, rows in self.sequences]
        if self.rotates:
            return "rotation"
        return "decodes" if all(decodes) else "hybrid" if any(decodes) else "chunks"

    def work(self, shape: AttentionShape, window: int | None = None) -> Work:
        if self.rotates:
            return rotation_work(sum(rows for _, rows in self.sequences), shape)
        return attention_work(self.sequences, shape, window)


def decodes(number: int, kv_len: int) -> tuple[tuple[int, int], ...]:
    return ((kv_len - 1, 1),) * number


def chunk(rows: int, kv_len: int) -> tuple[tuple[int, int], ...]:
    """The last ``rows`` of ``kv_len`` tokens."""
    return ((kv_len - rows, rows),)


def make_cases(scale: int = 1) -> dict[str, Case]:
    """By name; tokens and rows are divided by ``scale``, for tests, and the names stay."""
    few, many = 4096 // scale, 8192 // scale
    small, large = 512 // scale, 2048 // scale
    cases = (
        Case("decode-64x4k", decodes(64 // min(scale, 8), few), seconds=Bounds(420e-6, 390e-6), swept=True),
        Case("decode-8x4k", decodes(8, few), seconds=Bounds(64e-6, 53e-6)),
        Case("decode-1x32k", decodes(1, 32768 // scale), seconds=Bounds(64e-6, 53e-6)),
        Case("prefill-512-at-8k", chunk(small, many), flops_per_second=(350e12, 480e12), swept=True),
        Case("prefill-2048-at-16k", chunk(large, 16384 // scale), flops_per_second=(400e12, 550e12)),
        Case(
            "hybrid", decodes(64 // min(scale, 8), few) + chunk(small, many),
            sum_of=("decode-64x4k", "prefill-512-at-8k"),
        ),
        Case("rotate-64", decodes(64 // min(scale, 8), few), rotates=True),
        Case("rotate-512", chunk(small, many), rotates=True),
        Case("rotate-2048", chunk(large, 16384 // scale), rotates=True),
    )  # fmt: skip
    return {case.name: case for case in cases}


CASES = make_cases()


class Variant(NamedTuple):
    name: str
    """Empty for SHAPE without a window."""
    shape: AttentionShape
    window: int | None = None
    change: Callable[[Backend], Backend] = lambda backend: backend
    plain: bool = False
    """A model's own attention: nothing is tried out."""


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none."""

    case: Case
    backend: str
    variant: Variant
    work: Work
    error: float | None = None
    seconds: Timing | None = None
    failure: str | None = None

    @property
    def plain(self) -> bool:
        return self.variant.plain


def variants(case: Case, backend: Backend, shape: AttentionShape, window: int = WINDOW) -> Iterator[Variant]:
    """All that are measured, the plain ones first. Tilings are varied where the backend splits work by how many
    programs the device runs at once; two prefill programs on a multiprocessor share its registers."""
    if case.kind not in backend.own_kernels:
        return
    yield Variant("", shape, plain=True)
    if not case.rotates:
        yield Variant(f"window {window}", shape, window, plain=True)
    if case.swept:
        others = [Variant(f"page {size}", shape._replace(page_size=size)) for size in (16, 32, 64, 128)]
        others.append(Variant("fp8 KV", shape._replace(cache_dtype=FLOAT8)))
        for other in others:
            if other.shape != shape and not backend.needs(backend.target, other.shape):
                yield other
    busy = backend.tiling.busy
    if busy is None or case.rotates or case.sum_of:
        return
    if case.kind == "chunks":
        tile_rows = backend.tiling.prefill_rows // 2
        yield Variant(f"tiles of {tile_rows} rows", shape, change=_with(prefill_rows=tile_rows))
        for programs in (busy.prefill // 2, 2 * busy.prefill):
            yield Variant(f"{programs} programs", shape, change=_with(busy=busy._replace(prefill=programs)))
    else:
        for tokens in (backend.tiling.decode_tokens // 2, 2 * backend.tiling.decode_tokens):
            yield Variant(f"split {tokens}", shape, change=_with(decode_tokens=tokens))
        for programs in (busy.decode // 3, busy.decode * 2 // 3, 2 * busy.decode):
            yield Variant(f"{programs} programs", shape, change=_with(busy=busy._replace(decode=programs)))


def _with(**changes: Any) -> Callable[[Backend], Backend]:
    """Another tiling."""
    return lambda backend: dataclasses.replace(backend, tiling=dataclasses.replace(backend.tiling, **changes))


class Chain(NamedTuple):
    """A program of several calls in a row."""

    launch: Callable[[], Any]
    num_calls: int


class KernelBench:
    """Measures cases on the default device. Raises ConfigError where a backend cannot serve it at all."""

    def __init__(self, backends: Sequence[str], *, quick: bool = False, tiny: bool = False) -> None:
        """quick: measured for a shorter time. tiny: small cases, on any platform."""
        self._target = Target.of(jax.devices()[0])
        if self._target.platform != "gpu" and not tiny:
            raise ConfigError(
                f"kernels needs a GPU, or --tiny to try the benchmark itself, got {self._target.platform}"
            )
        scale = 64 if tiny else 1
        self.cases = make_cases(scale)
        self._shape, self._window = TINY_SHAPE if tiny else SHAPE, WINDOW // scale
        self._effort = Effort(3, 0.0, 0.1) if tiny else QUICK if quick else THOROUGH
        self._num_calls, self._cache_bytes = (2, 0) if tiny else (NUM_CALLS, LEAST_CACHE_BYTES)
        self._num_threads = 1 if tiny else max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._backends = [self._choose(name, self._shape) for name in backends]
        self.ceilings = measure_ceilings(self._effort)

    def rows(self, names: Sequence[str], *, plain: bool) -> Iterator[Row]:
        """Of the named cases the plain variants, or the others, as they are measured; one that fails is a row too.

        A few at a time are compiled and checked side by side, then timed alone.
        """
        wanted = [
            (self.cases[name], backend.name, variant)
            for name in names
            for backend in self._backends
            for variant in variants(self.cases[name], backend, self._shape, self._window)
            if variant.plain == plain
        ]
        with ThreadPoolExecutor(self._num_threads) as pool:
            for few in batched(wanted, self._num_threads):
                for row, chain in list(pool.map(lambda one: self._prepare(*one), few)):
                    yield row if chain is None else self._time(row, chain)

    def _choose(self, name: str, shape: AttentionShape) -> Backend:
        try:
            return choose_backend(name, self._target, shape)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _prepare(self, case: Case, name: str, variant: Variant) -> tuple[Row, Chain | None]:
        """The row as far as it goes without timing, and what is to be timed if the kernels are right."""
        row = Row(case, name, variant, case.work(variant.shape, variant.window))
        try:
            backend = variant.change(self._choose(name, variant.shape))
            batch = random_batch(
                case.sequences, variant.shape, backend, window=variant.window, cache_bytes=self._cache_bytes
            )
            error = (rotation_error if case.rotates else attention_error)(batch)
            if not error <= MOST_ERROR:
                return dataclasses.replace(row, failure=f"error of {error:.2g} above {MOST_ERROR}"), None
            num_calls = max(self._num_calls, batch.num_layers)
            launch = (rotation_chain if case.rotates else attention_chain)(batch, num_calls)
            jax.block_until_ready(launch())  # compiles
        except Exception as failure:  # whatever a kernel does, the other rows must be measured
            return dataclasses.replace(row, failure=_first_line(failure)), None
        return dataclasses.replace(row, error=error), Chain(launch, num_calls)

    def _time(self, row: Row, chain: Chain) -> Row:
        try:
            seconds = time_launches(chain.launch, self._effort).per(chain.num_calls)
        except Exception as failure:
            return dataclasses.replace(row, failure=_first_line(failure))
        return dataclasses.replace(row, seconds=seconds)


def _first_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def bounds(row: Row, rows: Sequence[Row]) -> Bounds | None:
    """On SHAPE without a window, for an H100; a hybrid's follow from its parts among ``rows``."""
    case = row.case
    if row.variant.name or row.variant.shape != SHAPE:
        return None
    if case.flops_per_second is not None:
        return Bounds(*(row.work.flops / rate for rate in case.flops_per_second))
    together = seconds_apart(row, rows)
    return case.seconds if together is None else Bounds(together + 10e-6, 0.8 * together)


def seconds_apart(row: Row, rows: Sequence[Row]) -> float | None:
    """What a hybrid's parts take in batches of their own, by the same backend."""
    parts = [
        other.seconds.median
        for name in row.case.sum_of or ()
        for other in rows
        if other.seconds
        and (other.case.name, other.backend, other.variant.name) == (name, row.backend, row.variant.name)
    ]
    return sum(parts) if len(parts) == 2 else None


def describe(row: Row, rows: Sequence[Row], ceilings: Ceilings) -> dict[str, str]:
    """A row of the table."""
    goal, apart = bounds(row, rows), seconds_apart(row, rows)
    measured = row.seconds.median if row.seconds else None
    floor = row.work.floor_seconds(ceilings)

    def number(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
        return "-" if value is None else f"{value / unit:.{digits}f}"

    def rate(amount: float, ceiling: float, unit: float) -> tuple[str, str]:
        if measured is None:
            return "-", "-"
        return number(amount / measured, unit), f"{amount / measured / ceiling:.0%}"

    speed, of_copy = rate(row.work.num_bytes, ceilings.copy_bytes_per_second, 1e9)
    flops, of_matmul = rate(row.work.flops, ceilings.matmul_flops_per_second, 1e12)
    return {
        "case": row.case.name,
        "backend": row.backend,
        "variant": row.variant.name or "-",
        "error": "-" if row.error is None else f"{row.error:.1e}",
        "us": number(measured, 1e-6),
        "spread": "-" if row.seconds is None else f"{row.seconds.spread:.0%}",
        "GB/s": speed,
        "of copy": of_copy,
        "TFLOP/s": flops,
        "of matmul": of_matmul,
        "floor us": number(floor, 1e-6),
        "of floor": "-" if measured is None else f"{floor / measured:.0%}",
        "first us": number(goal and goal.first, 1e-6),
        "stretch us": number(goal and goal.stretch, 1e-6),
        "apart us": number(apart, 1e-6),
    }


def to_json(row: Row, rows: Sequence[Row], ceilings: Ceilings) -> dict[str, Any]:
    """Everything measured, in seconds, bytes and operations."""
    goal = bounds(row, rows)
    return {
        "case": row.case.name,
        "backend": row.backend,
        "variant": row.variant.name,
        "plain": row.plain,
        "window": row.variant.window,
        "error": row.error,
        "seconds": row.seconds and row.seconds._asdict(),
        "work": row.work._asdict(),
        "floor_seconds": row.work.floor_seconds(ceilings),
        "bounds_seconds": goal and goal._asdict(),
        "apart_seconds": seconds_apart(row, rows),
        "failure": row.failure,
    }


def write_kernels(folder: Path, rows: Sequence[Row], ceilings: Ceilings) -> tuple[Path, Path]:
    """kernels-<device>.json and .md of what has been measured so far."""
    plain = [describe(row, rows, ceilings) for row in rows if row.plain]
    varied = [describe(row, rows, ceilings) for row in rows if not row.plain]
    return write_results(
        folder, "kernels",
        title="Attention kernels alone",
        method=METHOD,
        ceilings=ceilings,
        tables={"Cases": plain, "Variants": varied},
        notes=[f"{row.case.name}, {row.backend}, {row.variant.name or 'plain'}: {row.failure}"
               for row in rows if row.failure],
        raw={"rows": [to_json(row, rows, ceilings) for row in rows]},
    )  # fmt: skip
