"""Benchmarks of kernels, steps and devices, on a CPU: what they compute and write, never how long anything takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation import kernel_bench
from jaxserve.evaluation.attention_batch import (
    attention_error,
    attention_errors,
    attention_work,
    random_batch,
    rotation_error,
)
from jaxserve.evaluation.device_bench import (
    WARM_UPS,
    Ceilings,
    Effort,
    Timing,
    Work,
    measure_ceilings,
    time_launches,
)
from jaxserve.evaluation.gpu_check.stages import TINY_ENVIRONMENT
from jaxserve.evaluation.kernel_bench import CASES, SHAPE, TINY_SHAPE, KernelBench, Row, Variant, bounds
from jaxserve.kernels.backend import CPU_TILING, Target
from jaxserve.kernels.plan import BusyPrograms, Tiling
from jaxserve.kernels.reach import Reach
from jaxserve.kernels.triton_attention import Triton
from jaxserve.kernels.xla import Xla

BENCH = Path(__file__).parents[2] / "scripts" / "bench.py"
XLA = Xla(CPU_TILING, Target("cpu"))
H100 = Ceilings(3.0e12, 798e12)
"""As measured on one."""


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly() -> Iterator[None]:
    """Compiling is all that takes time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_floors_are_those_of_the_table_of_targets() -> None:
    """358 us, 45 us and 83 us, worked out by hand for an H100."""
    for name, microseconds in (("decode-64x4k", 358), ("decode-8x4k", 45), ("decode-1x32k", 45),
                               ("prefill-512-at-8k", 83)):  # fmt: skip
        floor = attention_work(CASES[name].sequences, SHAPE).floor_seconds(H100)
        assert floor == pytest.approx(microseconds * 1e-6, rel=0.01), name


def test_a_roofline_is_the_longer_of_both() -> None:
    assert Work(flops=2.0, num_bytes=8.0).floor_seconds(Ceilings(4.0, 2.0)) == 2.0
    assert Work(flops=6.0, num_bytes=8.0).floor_seconds(Ceilings(4.0, 2.0)) == 3.0


def test_timing_counts_every_launch() -> None:
    launches = []
    timing = time_launches(lambda: launches.append(1), Effort(repeats=4, least_seconds=0.0, most_seconds=60.0))
    assert len(launches) == WARM_UPS + 1 + 4
    assert timing.shortest <= timing.median <= timing.longest
    assert Timing(4.0, 2.0, 6.0).per(2) == Timing(2.0, 1.0, 3.0)
    assert Timing(4.0, 2.0, 6.0).spread == 1.0


def test_ceilings_are_positive() -> None:
    assert min(measure_ceilings(Effort(1, 0.0, 0.0))) > 0


MIXED = ((40, 1), (0, 1), (70, 20), (0, 33))


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_right_kernels_pass(page_size: int, cache_dtype: str) -> None:
    shape = TINY_SHAPE._replace(page_size=page_size, cache_dtype=jnp.dtype(cache_dtype))
    batch = random_batch(MIXED, shape, XLA, cache_bytes=0)
    assert 0 < attention_error(batch) < kernel_bench.MOST_ERROR
    if cache_dtype == "bfloat16":
        assert 0 < rotation_error(batch) < kernel_bench.MOST_ERROR


@pytest.mark.parametrize(("window", "softcap", "rotated"), [(20, None, 0), (None, 2.0, 8), (30, 2.0, 16)])
def test_what_is_special_about_a_layer_is_in_the_reference(
    window: int | None, softcap: float | None, rotated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(
        MIXED, TINY_SHAPE, XLA, window=window, softcap=softcap, rotated=rotated, poison=400.0, cache_bytes=0
    )
    errors = attention_errors(batch, 3)
    assert errors == [errors[0]] * 3
    assert 0 < errors[0] < kernel_bench.MOST_ERROR
    assert 0 <= rotation_error(batch) < kernel_bench.MOST_ERROR
    right = Xla.attend
    for without, value in (({"reach": Reach()}, window), ({"softcap": None}, softcap)):
        monkeypatch.setattr(Xla, "attend", lambda *args, without=without, **kwargs: right(*args, **kwargs | without))
        assert (attention_error(batch) < kernel_bench.MOST_ERROR) == (value is None)


def test_wrong_kernels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row too few, the wrong keys, not a number, and writing where nothing should be written."""
    batch = random_batch(MIXED, TINY_SHAPE, XLA)
    right = Xla.attend

    def broken(change):
        monkeypatch.setattr(Xla, "attend", lambda *args, **kwargs: change(right(*args, **kwargs)))
        return attention_error(batch)

    assert broken(lambda out: out) < kernel_bench.MOST_ERROR
    assert broken(lambda out: out.at[3].set(0)) > 5 * kernel_bench.MOST_ERROR
    assert broken(lambda out: jnp.roll(out, 1, axis=1)) > 0.5
    assert not broken(lambda out: out.at[3, 0, 0].set(jnp.nan)) < kernel_bench.MOST_ERROR
    assert not broken(lambda out: out.at[-1].set(1)) < kernel_bench.MOST_ERROR
    rotate = Xla.rotate_and_write
    monkeypatch.setattr(
        Xla, "rotate_and_write",
        lambda *args: (lambda q, cache: (q, cache._replace(k=cache.k.at[0, 1].add(1))))(*rotate(*args)),
    )  # fmt: skip
    assert not rotation_error(batch) < kernel_bench.MOST_ERROR


def test_variants_change_one_thing() -> None:
    backend = Triton(Tiling(256, 32, BusyPrograms(396, 132, 8)), Target("gpu", 90, 132))
    found = {v.name: v for v in kernel_bench.variants(CASES["decode-64x4k"], backend, SHAPE)}
    assert list(found) == [
        "", "window 4096", "page 16", "page 32", "page 128", "fp8 KV", "split 128", "split 512",
        "132 programs", "264 programs", "792 programs",
    ]  # fmt: skip
    assert [name for name, variant in found.items() if variant.plain] == ["", "window 4096"]
    assert found["132 programs"].change(backend).tiling == Tiling(256, 32, BusyPrograms(132, 132, 8))
    assert found["split 512"].change(backend).tiling == Tiling(512, 32, BusyPrograms(396, 132, 8))
    assert found["page 16"].change(backend) == backend
    chunks = [v.name for v in kernel_bench.variants(CASES["prefill-2048-at-16k"], backend, SHAPE)]
    assert chunks == ["", "window 4096", "tiles of 16 rows", "66 programs", "264 programs"]
    assert [v.name for v in kernel_bench.variants(CASES["hybrid"], backend, SHAPE)] == ["", "window 4096"]
    assert [v.name for v in kernel_bench.variants(CASES["rotate-64"], backend, SHAPE)] == [""]


def test_bounds() -> None:
    def row(name: str, median: float) -> Row:
        case = CASES[name]
        variant = Variant("", SHAPE, plain=True)
        return Row(case, "triton", variant, case.work(SHAPE), 0.0, Timing(median, median, median))

    rows = [row("decode-64x4k", 400e-6), row("prefill-512-at-8k", 150e-6), row("hybrid", 500e-6)]
    assert bounds(rows[0], rows) == (420e-6, 390e-6)
    assert bounds(rows[1], rows) == pytest.approx((190e-6, 139e-6), rel=0.01)
    assert bounds(rows[2], rows) == pytest.approx((560e-6, 440e-6))
    assert bounds(rows[2], rows[1:]) is None


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    """In an environment in which compiling, which is all that takes time, takes less."""
    command, environment = [sys.executable, str(BENCH), *args], os.environ | TINY_ENVIRONMENT
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_kernels_need_a_gpu() -> None:
    done = bench("kernels")
    assert done.returncode == 2
    assert done.stderr == "bench.py: error: kernels needs a GPU, or --tiny to try the benchmark itself, got cpu\n"
    with pytest.raises(ConfigError, match="attention_backend triton needs a GPU, got cpu"):
        KernelBench(["triton"], tiny=True)


def test_kernels_from_flags_to_files(tmp_path: Path) -> None:
    cases = ["decode-64x4k", "prefill-512-at-8k", "hybrid", "rotate-64"]
    done = bench("kernels", "--tiny", "--quick", "--backends", "xla", "--cases", *cases, "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "kernels-cpu.json").read_text())
    rows = {row["case"]: row for row in raw["rows"] if row["window"] is None}
    assert list(rows) == cases
    assert [row["case"] for row in raw["rows"] if row["window"] == 64] == cases[:3]
    for row in raw["rows"]:
        assert row["failure"] is None
        assert 0 < row["error"] < kernel_bench.MOST_ERROR
        assert row["seconds"]["median"] > 0
    apart = sum(rows[name]["seconds"]["median"] for name in cases[:2])
    assert rows["hybrid"]["apart_seconds"] == pytest.approx(apart)
    assert raw["ceilings"]["copy_bytes_per_second"] > 0
    page = (tmp_path / "kernels-cpu.md").read_text()
    assert "| case | backend | variant |" in page
    assert kernel_bench.METHOD in page


def test_every_variant_is_measured() -> None:
    rows = list(KernelBench(["xla"], tiny=True).rows(["decode-64x4k"], plain=False))
    assert [row.variant.name for row in rows] == ["page 16", "page 32", "page 128", "fp8 KV"]
    assert all(row.failure is None and row.error < kernel_bench.MOST_ERROR for row in rows)


def test_a_kernel_that_fails_leaves_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*args: object, **kwargs: object) -> jax.Array:
        raise RuntimeError("out of registers\nand a long log")

    monkeypatch.setattr(Xla, "attend", fails)
    tiny = KernelBench(["xla"], tiny=True, quick=True)
    rows = list(tiny.rows(["decode-8x4k", "rotate-64"], plain=True))
    assert [row.failure for row in rows] == [*["RuntimeError: out of registers"] * 2, None]
    _, page = kernel_bench.write_kernels(tmp_path, rows, tiny.ceilings)
    assert "- decode-8x4k, xla, plain: RuntimeError: out of registers" in page.read_text()
    assert np.isfinite(rows[2].seconds.median)
