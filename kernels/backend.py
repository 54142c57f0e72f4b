"""Which kernels compute attention on a device, and how they want a batch cut."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import native
from jaxserve.kernels.plan import BusyItems, Tiling

logger = logging.getLogger(__name__)

CPU_TILING = Tiling(decode_tokens=128, prefill_rows=64)
"""Of the backends that serve CPUs: xla, which serves all platforms, and native."""
SPLIT_TOKENS = 128
"""KV tokens below which splitting costs a GPU more than it gains."""
DECODE_PROGRAMS_PER_CORE = 3
"""As many as fit into shared memory: of a multiprocessor's 227 KiB each takes 70."""
PREFILL_PROGRAMS_PER_CORE = 1
"""A prefill program's accumulators take all registers of a multiprocessor."""
HOPPER = 90
GPU_BACKENDS = ("triton", "pod", "mosaic")


class Target(NamedTuple):
    """A device as far as kernels differ between devices."""

    platform: str
    """``cpu`` or ``gpu``."""
    compute_capability: int = 0
    """Of a GPU, 90 for Hopper."""
    num_cores: int = 1
    """A GPU's multiprocessors."""

    @classmethod
    def of(cls, device: jax.Device) -> Target:
        if device.platform != "gpu":
            return cls(device.platform)
        return cls("gpu", int(float(device.compute_capability) * 10), device.core_count)


CPU = Target("cpu")


class AttentionShape(NamedTuple):
    """What one device computes: heads are its own, under tensor parallelism a share of the model's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    """Of queries and outputs."""
    cache_dtype: jnp.dtype


@dataclass(frozen=True)
class Backend:
    name: str
    """One of config.ATTENTION_BACKENDS but ``auto``."""
    tiling: Tiling = CPU_TILING
    target: Target = CPU


def choose_backend(name: str, target: Target, shape: AttentionShape) -> Backend:
    """The backend ``name``, one of config.ATTENTION_BACKENDS; ValueError where it cannot serve.

    auto: native on CPUs in float32 or bfloat16 with a C++ compiler, triton on GPUs with jax-triton, xla otherwise.
    """
    if name == "auto":
        name = _automatic(target, shape)
    if name != "xla" and (needed := _NEEDS[name](target, shape)):
        raise ValueError(f"attention_backend {name} needs {needed}")
    if name in ("xla", "native"):
        return Backend(name, CPU_TILING, target)
    tiling = _gpu_tiling(target, shape)
    return Backend(name, _fused(tiling, target) if name == "pod" else tiling, target)


def gpu_variants(target: Target, shape: AttentionShape) -> dict[str, Backend]:
    """What is worth timing against each other on a GPU, by name; those of them that serve it. The default is first."""
    found = {name: choose_backend(name, target, shape) for name in GPU_BACKENDS if not _NEEDS[name](target, shape)}
    if "triton" in found:
        found["triton, 2 prefill programs"] = _with_prefill_programs(found["triton"], 2)
    return found


def _with_prefill_programs(backend: Backend, programs: int) -> Backend:
    """``programs`` on a multiprocessor, which share its registers (triton_attention tells the compiler)."""
    tiling = backend.tiling
    assert tiling.busy is not None
    busy = tiling.busy._replace(prefill=programs * backend.target.num_cores)
    return replace(backend, tiling=replace(tiling, busy=busy))


def has_native_kernels(target: Target, dtype: jnp.dtype) -> bool:
    """Whether C++ computes in ``dtype`` here. Where it can be built, it is."""
    return target.platform == "cpu" and dtype in (jnp.float32, jnp.bfloat16) and native.available()


def _automatic(target: Target, shape: AttentionShape) -> str:
    if target.platform == "cpu":
        return "xla" if _native_needs(target, shape) else "native"
    missing = _triton_needs(target, shape)
    if missing:
        logger.warning("attention runs in plain XLA, which is slow on GPUs: its kernels need %s", missing)
    return "xla" if missing else "triton"


def _native_needs(target: Target, shape: AttentionShape) -> str | None:
    if shape.dtype == shape.cache_dtype and has_native_kernels(target, shape.dtype):
        return None
    return (
        "a CPU, float32 or bfloat16 with a KV cache of the same, and a C++ compiler, "
        f"got {target.platform}, {shape.dtype.name} and {shape.cache_dtype.name}"
    )


def _triton_needs(target: Target, shape: AttentionShape) -> str | None:
    if target.platform != "gpu":
        return f"a GPU, got {target.platform}"
    if target.compute_capability < 80:
        return f"a GPU of compute capability 8.0 or newer, got {target.compute_capability / 10}"
    if shape.page_size < 16:
        return f"a block_size of at least 16, got {shape.page_size}"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"the package {missing[0]}, which jaxserve's extras cuda12 and cuda13 install" if missing else None


def _mosaic_needs(target: Target, shape: AttentionShape) -> str | None:
    if needed := _triton_needs(target, shape):  # decodes are Triton's
        return needed
    if target.compute_capability // 10 != HOPPER // 10:
        return f"a Hopper GPU (compute capability 9.0), got {target.compute_capability / 10}"
    if shape.num_heads > 16 * shape.num_kv_heads:
        return f"at most 16 query heads for each KV head, got {shape.num_heads // shape.num_kv_heads}"
    if shape.page_size != 64 or shape.head_dim not in (64, 128):
        return f"block_size 64 and head_dim 64 or 128, got {shape.page_size} and {shape.head_dim}"
    if shape.cache_dtype != shape.dtype or shape.dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16 with a KV cache of the same, got {shape.dtype.name} and {shape.cache_dtype.name}"
    return None


def _pod_needs(target: Target, shape: AttentionShape) -> str | None:
    if needed := _triton_needs(target, shape):
        return needed
    if target.compute_capability < HOPPER:
        return f"a GPU of compute capability 9.0 or newer, got {target.compute_capability / 10}"
    return f"a head_dim of at most 128, got {shape.head_dim}" if shape.head_dim > 128 else None


_NEEDS = {"native": _native_needs, "triton": _triton_needs, "mosaic": _mosaic_needs, "pod": _pod_needs}


def _gpu_tiling(target: Target, shape: AttentionShape) -> Tiling:
    """A tile's rows are its queries times the query heads that share a KV head: 128 for two warpgroups' matrix
    products, 64 where heads are so long that 128 rows of accumulators would spill."""
    group = shape.num_heads // shape.num_kv_heads
    tile = 128 if shape.head_dim <= 128 else 64
    busy = BusyItems(
        decode=target.num_cores * DECODE_PROGRAMS_PER_CORE,
        prefill=target.num_cores * PREFILL_PROGRAMS_PER_CORE,
        kv_heads=shape.num_kv_heads,
    )
    return Tiling(SPLIT_TOKENS, max(1, tile // group), busy)


def _fused(tiling: Tiling, target: Target) -> Tiling:
    """For POD's launch, which has a program of each kind on a multiprocessor: prefill items that last one wave of these
    or two, and shorter decode items, so that both kinds are done at about the same time."""
    assert tiling.busy is not None
    busy = tiling.busy._replace(decode=2 * target.num_cores, prefill=target.num_cores)
    return replace(tiling, fused=busy)
