"""Paged attention on GPUs with one launch for hybrid batches, after POD-Attention; see triton_pod.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax

from jaxserve.kernels.backend import AttentionShape, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.triton_attention import Triton


@dataclass(frozen=True)
class Pod(Triton):
    """As Triton, but that its launches find nothing in hybrid batches, which have one of their own."""

    name = "pod"
    own_kernels = frozenset(("hybrid",))

    @classmethod
    def of(cls, target: Target, shape: AttentionShape) -> Self:
        """The launch has a program of each kind on a multiprocessor: prefill items that last one wave of these or two,
        and shorter decode items, so that both kinds are done at about the same time."""
        backend = super().of(target, shape)
        assert backend.tiling.busy is not None
        fused = backend.tiling.busy._replace(decode=2 * target.num_cores, prefill=target.num_cores)
        return replace(backend, tiling=replace(backend.tiling, fused=fused))

    @staticmethod
    def needs(target: Target, shape: AttentionShape) -> str | None:
        if needed := Triton.needs(target, shape):
            return needed
        if target.compute_capability < 90:
            return f"a GPU of compute capability 9.0 or newer, got {target.compute_capability / 10}"
        return f"a head_dim of at most 128, got {shape.head_dim}" if shape.head_dim > 128 else None

    def _results(
        self,
        q: jax.Array,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
        sinks: jax.Array | None,
        **masking: Any,
    ) -> tuple[jax.Array, Sequence[jax.Array], Sequence[jax.Array]]:
        from jaxserve.kernels import triton_launch  # it needs packages that only GPUs do

        results = super()._results(q, cache, inputs, layer, sinks, **masking)
        return triton_launch.attend_both(q, cache, inputs, layer, sinks, *results, **masking)
