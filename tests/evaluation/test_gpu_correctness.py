"""What a GPU check compares, on kernels in Triton's interpreter: right ones must pass it, on poisoned memory too."""

from __future__ import annotations

import math

import pytest

from jaxserve.evaluation.attention_batch import attention_errors, random_batch, rotation_error
from jaxserve.evaluation.attention_variants import VARIANTS, Variant
from jaxserve.evaluation.gpu_check import correctness
from jaxserve.kernels import triton_launch
from jaxserve.kernels.backend import Target
from jaxserve.kernels.plan import BusyPrograms, Tiling
from jaxserve.kernels.triton_attention import Triton
from tests.kernels import triton_interpreter

HOPPER = Target("gpu", 90, 132)
MANY_SPLITS = Triton(Tiling(16, 4, BusyPrograms(40, 20)), Target("gpu", 90, 4))


@pytest.mark.parametrize(
    "variant",
    [
        Variant(heads=4, kv_heads=2, head_dim=16, page_size=16, rotated=8, window=30, softcap=5.0),
        Variant(heads=4, kv_heads=2, head_dim=16, page_size=16, rotated=0, cache_dtype="float8_e4m3fn"),
    ],
    ids=["window, soft cap, part rotated", "float8 KV, not rotated"],
)
def test_right_kernels_pass(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "triton_call", triton_interpreter.triton_call)
    batch = random_batch(
        correctness.TINY_SEQUENCES, variant.shape, MANY_SPLITS, window=variant.window, softcap=variant.softcap,
        rotated=variant.rotated, poison=math.nan, cache_bytes=0,
    )  # fmt: skip
    first, second = attention_errors(batch, 2)
    assert first == second
    assert 0 < first < correctness.MOST_ERROR
    assert rotation_error(batch) < correctness.MOST_FLOAT8_ERROR


def test_every_variant_is_checked_with_what_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "of", lambda device: HOPPER)
    cases = correctness._cases(tiny=False)
    assert [case for case in cases if case.startswith("triton/")] == [f"triton/{name}" for name in VARIANTS]
    assert [case.removeprefix("mosaic/") for case in cases if case.startswith("mosaic/")] == [
        "bfloat16 32/8 x 128", "float16", "window", "soft cap", "group 1", "group 8", "32/8 x 64",
        "64/8 x 64, window, sinks", "40/8 x 128, chunks",
    ]  # fmt: skip


def test_the_batch_splits_decodes_and_chunks_and_has_padding() -> None:
    variant = VARIANTS["window"]
    backend = correctness.choose_backend("triton", HOPPER, variant.shape)
    small = variant.shape._replace(num_heads=1, num_kv_heads=1, head_dim=16)
    batch = random_batch(correctness.SEQUENCES, small, backend, window=variant.window, cache_bytes=0)
    plan = batch.inputs.plan
    rows = plan.combine[: int(plan.counts[2]), 1]
    assert 1 in rows, "a decode in parts"
    assert max(rows) > 1, "a tile in parts"
    assert batch.num_rows < len(batch.qkv), "padding"
