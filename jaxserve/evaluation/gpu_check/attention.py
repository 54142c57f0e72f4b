"""Attention kernels alone: as models have them, then what may be better, as far as the time goes."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from jaxserve.errors import ConfigError
from jaxserve.evaluation.gpu_check.stage import Context, StageFailed
from jaxserve.evaluation.kernel_bench import SHAPE, KernelBench, Row, to_json
from jaxserve.kernels.backend import Target
from jaxserve.kernels.registry import GPU_BACKENDS, gpu_variants

PLAIN = ("decode-64x4k", "prefill-512-at-8k", "prefill-2048-at-16k", "hybrid", "decode-8x4k", "decode-1x32k",
         "rotate-64", "rotate-512", "rotate-2048")  # fmt: skip
VARIED = ("prefill-2048-at-16k", "prefill-512-at-8k", "decode-1x32k", "decode-8x4k", "decode-64x4k")
"""Cases that are measured, the most telling ones first."""
TINY_PLAIN = ("decode-8x4k",)
LAST_SECONDS = 20.0
"""No more rows are begun with less left: the next few are compiled together."""


def run(context: Context) -> None:
    bench = KernelBench(["xla"] if context.tiny else _backends(), quick=True, tiny=context.tiny)
    context.records.add("ceilings", **bench.ceilings._asdict())
    rows: list[Row] = []
    for row in _rows(bench, tiny=context.tiny):
        rows.append(row)
        context.records.add("attention", **to_json(row, rows, bench.ceilings))
        if context.left_seconds < LAST_SECONDS:
            break
    wrong = [row for row in rows if row.failure]
    if wrong:
        raise StageFailed(f"{len(wrong)} of {len(rows)} rows failed, the first with {wrong[0].failure}")


def _backends() -> list[str]:
    """Those that serve the device."""
    if jax.default_backend() != "gpu":
        raise ConfigError(f"gpu_check needs a GPU, or --tiny to try it on any machine, got {jax.default_backend()}")
    return [name for name in gpu_variants(Target.of(jax.devices()[0]), SHAPE) if name in GPU_BACKENDS]


def _rows(bench: KernelBench, *, tiny: bool) -> Iterator[Row]:
    if tiny:
        yield from bench.rows(TINY_PLAIN, plain=True)
        return
    yield from bench.rows(PLAIN, plain=True)
    yield from bench.rows(VARIED, plain=False)
