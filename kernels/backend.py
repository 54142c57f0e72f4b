"""What a backend of attention is: kernels for a kind of device, and how they want a batch cut."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.plan import Tiling
from jaxserve.kernels.reach import Reach
from jaxserve.kernels.recurrent import RuleRows, Segments, run_rows

if TYPE_CHECKING:  # a step's inputs say which backend they are cut for
    from jaxserve.kernels.inputs import AttentionInputs, Rotation

CPU_TILING = Tiling(decode_tokens=128, prefill_rows=64)
BATCH_KINDS = frozenset(("rotation", "decodes", "chunks", "hybrid"))
"""What kernels differ for: rotating and writing, and attention over decodes, over chunks, over both at once."""


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


def triton_needs(target: Target) -> str | None:
    """What the device or its machine lack for kernels in Triton, after "needs"; None where they serve."""
    if target.platform != "gpu":
        return f"a GPU, got {target.platform}"
    if target.compute_capability < 80:
        return f"a GPU of compute capability 8.0 or newer, got {target.compute_capability / 10}"
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    return f"the package {missing[0]}, which jaxserve's extras cuda12 and cuda13 install" if missing else None


class AttentionShape(NamedTuple):
    """What one device computes: heads are its own, under tensor parallelism a share of the model's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    """Of queries and outputs."""
    cache_dtype: jnp.dtype
    has_values: bool = True
    """Whether values lie apart from keys in the cache (KVCache.v)."""


@dataclass(frozen=True)
class Backend(ABC):
    """Kernels that attend on one device, to its own heads. A backend is a file and a row in kernels/registry.py.

    It is a constant of compiled programs. Packages that only some devices have are imported where its kernels are
    called, so that every backend can be asked what it needs.
    """

    name: ClassVar[str]
    """As in config.ATTENTION_BACKENDS."""
    own_kernels: ClassVar[frozenset[str]] = BATCH_KINDS
    """For which of these it has kernels of its own; others are those of a backend that it builds on."""
    skips_padding: ClassVar[bool] = False
    """Whether rows that go to the dummy page are left out: their queries and outputs are whatever was in memory."""

    tiling: Tiling
    """How it wants a batch cut."""
    target: Target

    @classmethod
    def of(cls, target: Target, shape: AttentionShape) -> Self:
        """The backend for a device that it serves, cut as is good for CPUs."""
        return cls(CPU_TILING, target)

    @staticmethod
    @abstractmethod
    def needs(target: Target, shape: AttentionShape) -> str | None:
        """What the device or the model lack for it, after "needs"; None where it serves."""

    @abstractmethod
    def rotate_and_write(
        self, qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """See kernels.attention.rotate_and_write."""

    def recur(
        self, rows: RuleRows, memory: jax.Array, segments: Segments, layer: jax.Array, corrects: bool
    ) -> tuple[jax.Array, jax.Array]:
        """See kernels.recurrent.RunRows."""
        return run_rows(rows, memory, segments, layer, corrects)

    @abstractmethod
    def attend(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        *,
        scale: float,
        reach: Reach,
        softcap: float | None,
    ) -> jax.Array:
        """See kernels.attention.paged_attention."""
