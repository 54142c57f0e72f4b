"""Which kernels serve which device, and what is said where they cannot."""

from __future__ import annotations

import importlib.util
import logging

import jax.numpy as jnp
import pytest

from jaxserve.config import ATTENTION_BACKENDS
from jaxserve.kernels import native
from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.registry import BACKENDS, choose_backend, gpu_variants

CPU, H100, A100, V100 = Target("cpu"), Target("gpu", 90, 132), Target("gpu", 80, 108), Target("gpu", 70, 80)
BFLOAT16 = jnp.dtype("bfloat16")
MISTRAL = AttentionShape(32, 8, 128, 64, BFLOAT16, BFLOAT16)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names added to it are packages that are not installed."""
    missing: set[str] = set()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name) or object())
    return missing


def test_the_configuration_knows_every_backend() -> None:
    assert ("auto", *BACKENDS) == ATTENTION_BACKENDS


def test_the_platform_chooses(without: set[str]) -> None:
    float32 = MISTRAL._replace(dtype=jnp.dtype("float32"), cache_dtype=jnp.dtype("float32"))
    assert choose_backend("auto", CPU, float32).name == ("native" if native.available() else "xla")
    assert choose_backend("auto", CPU, MISTRAL).name == choose_backend("auto", CPU, float32).name
    float16 = jnp.dtype("float16")
    assert choose_backend("auto", CPU, MISTRAL._replace(dtype=float16, cache_dtype=float16)).name == "xla"
    assert choose_backend("auto", CPU, float32._replace(cache_dtype=jnp.dtype(jnp.float8_e4m3fn))).name == "xla"
    assert choose_backend("auto", H100, MISTRAL).name == "triton"
    assert choose_backend("auto", A100, MISTRAL).name == "triton"
    assert choose_backend("xla", H100, MISTRAL).name == "xla"
    assert choose_backend("auto", H100, MISTRAL._replace(has_values=False)).name == "xla"
    assert choose_backend("mosaic", H100, MISTRAL).name == "mosaic"


def test_gpus_without_their_packages_are_served_slowly_and_told(
    without: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    without.add("jax_triton")
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", H100, MISTRAL).name == "xla"
    assert "slow on GPUs: its kernels need the package jax_triton" in caplog.text


@pytest.mark.parametrize(
    ("name", "target", "shape", "message"),
    [
        ("native", H100, MISTRAL, "native needs a CPU, float32 or bfloat16 .* got gpu, bfloat16 and bfloat16"),
        ("triton", CPU, MISTRAL, "triton needs a GPU, got cpu"),
        ("triton", V100, MISTRAL, "triton needs a GPU of compute capability 8.0 or newer, got 7.0"),
        ("triton", H100, MISTRAL._replace(page_size=8), "triton needs a block_size of at least 16, got 8"),
        ("triton", H100, MISTRAL._replace(head_dim=512), "triton needs a head_dim of at most 256, got 512"),
        ("triton", H100, MISTRAL._replace(has_values=False), "triton needs keys and values that lie apart"),
        ("pod", A100, MISTRAL, "pod needs a GPU of compute capability 9.0 or newer, got 8.0"),
        ("pod", H100, MISTRAL._replace(head_dim=256), "pod needs a head_dim of at most 128, got 256"),
        ("mosaic", A100, MISTRAL, "mosaic needs a Hopper GPU \\(compute capability 9.0\\), got 8.0"),
        ("mosaic", H100, MISTRAL._replace(num_heads=256), "at most 16 query heads for each KV head, got 32"),
        ("mosaic", H100, MISTRAL._replace(page_size=32), "block_size 64 and head_dim 64 or 128, got 32 and 128"),
        ("mosaic", H100, MISTRAL._replace(head_dim=80), "block_size 64 and head_dim 64 or 128, got 64 and 80"),
        (
            "mosaic", H100, MISTRAL._replace(cache_dtype=jnp.dtype(jnp.float8_e4m3fn)),
            "bfloat16 or float16 with a KV cache of the same, got bfloat16 and float8_e4m3fn",
        ),
    ],
)  # fmt: skip
def test_where_a_backend_cannot_serve(
    name: str, target: Target, shape: AttentionShape, message: str, without: set[str]
) -> None:
    with pytest.raises(ValueError, match=f"attention_backend {message}|{message}"):
        choose_backend(name, target, shape)


def test_tiles_fill_the_matrix_units(without: set[str]) -> None:
    for heads, dim, rows in ((32, 128, 128), (71, 64, 71), (12, 256, 60), (8, 80, 128)):
        shape = MISTRAL._replace(num_heads=heads, num_kv_heads=1 if heads == 71 else heads // 4, head_dim=dim)
        if heads == 12:
            shape = shape._replace(num_kv_heads=2)
        group = shape.num_heads // shape.num_kv_heads
        assert choose_backend("triton", H100, shape).tiling.prefill_rows * group == rows


@pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
def test_native_tiles_stay_in_a_cores_cache() -> None:
    latent = MISTRAL._replace(num_heads=128, num_kv_heads=1, head_dim=576, has_values=False)
    for shape, rows in ((MISTRAL, 64), (latent, 7), (latent._replace(num_heads=16), 56)):
        assert choose_backend("native", CPU, shape).tiling.prefill_rows == rows


def test_what_is_timed_on_a_gpu(without: set[str]) -> None:
    """Each differs from the others; the default is first."""
    found = gpu_variants(H100, MISTRAL)
    assert [*found] == ["triton", "pod", "mosaic", "triton, 2 prefill programs"]
    assert len(set(found.values())) == len(found)
    assert found["triton"] == choose_backend("auto", H100, MISTRAL)
    assert [*gpu_variants(A100, MISTRAL)] == ["triton", "triton, 2 prefill programs"]
    assert gpu_variants(CPU, MISTRAL) == {}


def test_programs_of_a_launch_all_run_at_once(without: set[str]) -> None:
    """Multiprocessors times programs on each, whatever the number of KV heads."""
    for kv_heads in (1, 8, 32):
        busy = choose_backend("triton", H100, MISTRAL._replace(num_kv_heads=kv_heads)).tiling.busy
        assert busy == (396, 132, kv_heads)
