"""Paged attention on GPUs in Triton: the backend, whose kernels triton_launch.py launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax

from jaxserve.kernels.backend import AttentionShape, Backend, Target, triton_needs
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.plan import BusyPrograms, Tiling
from jaxserve.kernels.reach import Reach

SPLIT_TOKENS = 128
"""KV tokens below which splitting costs a GPU more than it gains."""
DECODE_PROGRAMS_PER_CORE = 3
"""As many as fit into shared memory: of a multiprocessor's 227 KiB each takes 70."""
LARGEST_HEAD = 256
"""Longer ones' accumulators have no room in a multiprocessor's registers."""
PREFILL_PROGRAMS_PER_CORE = 1
"""A prefill program's accumulators take all registers of a multiprocessor."""


@dataclass(frozen=True)
class Triton(Backend):
    """Three launches attend: prefill items, decode items, and what puts partial results together."""

    name = "triton"

    @classmethod
    def of(cls, target: Target, shape: AttentionShape) -> Self:
        """A tile's rows are its queries times the query heads that share a KV head: 128 for two warpgroups' matrix
        products, 64 where heads are so long that 128 rows of accumulators would spill."""
        group = shape.num_heads // shape.num_kv_heads
        tile = 128 if shape.head_dim <= 128 else 64
        busy = BusyPrograms(
            decode=target.num_cores * DECODE_PROGRAMS_PER_CORE,
            prefill=target.num_cores * PREFILL_PROGRAMS_PER_CORE,
            kv_heads=shape.num_kv_heads,
        )
        return cls(Tiling(SPLIT_TOKENS, max(1, tile // group), busy), target)

    @staticmethod
    def needs(target: Target, shape: AttentionShape) -> str | None:
        if (lacking := triton_needs(target)) is not None:
            return lacking
        if shape.page_size < 16:
            return f"a block_size of at least 16, got {shape.page_size}"
        if shape.head_dim > LARGEST_HEAD:
            return f"a head_dim of at most {LARGEST_HEAD}, got {shape.head_dim}"
        return None if shape.has_values else "keys and values that lie apart, not a latent that is both"

    def with_prefill_programs(self, programs: int) -> Self:
        """``programs`` on a multiprocessor, which share its registers (triton_launch tells the compiler)."""
        assert self.tiling.busy is not None
        busy = self.tiling.busy._replace(prefill=programs * self.target.num_cores)
        return replace(self, tiling=replace(self.tiling, busy=busy))

    def rotate_and_write(
        self, qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        from jaxserve.kernels import triton_launch  # it needs packages that only GPUs do

        return triton_launch.rotate_and_write(qkv, rotation, cache, inputs, layer)

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
        from jaxserve.kernels import triton_launch

        results = self._results(q, cache, inputs, layer, sinks, scale=scale, reach=reach, softcap=softcap)
        return triton_launch.combine(*results, inputs, sinks)

    def _results(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        **masking: Any,
    ) -> tuple[jax.Array, Sequence[jax.Array], Sequence[jax.Array]]:
        """The output as far as whole tiles write it, and the partial results of prefill and of decode."""
        from jaxserve.kernels import triton_launch

        out, *prefill = self._prefill(q, cache, inputs, layer, sinks, **masking)
        return out, prefill, triton_launch.attend(triton_launch.DECODE, q, cache, inputs, layer, None, **masking)

    def _prefill(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        **masking: Any,
    ) -> Sequence[jax.Array]:
        """The output and the partial results of prefill items."""
        from jaxserve.kernels import triton_launch

        return triton_launch.attend(triton_launch.PREFILL, q, cache, inputs, layer, sinks, **masking)
