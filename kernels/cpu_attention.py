"""Native paged attention for CPUs, cpu_rotate.cc and cpu_attention.cc: what kernels/xla.py does, faster.

There are no gathered copies of the cache, and vector code that XLA does not find for such small products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels import native
from jaxserve.kernels.backend import CPU_TILING, AttentionShape, Backend, Target
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.kernels.reach import Reach
from jaxserve.kernels.recurrent import RuleRows, Segments

TILE_VALUES = 2**19
"""Of the queries of a prefill item, in float32."""
NO_WINDOW = np.iinfo(np.int32).max
"""A window that every position lies in."""


@dataclass(frozen=True)
class Native(Backend):
    """float32 or bfloat16, the cache of the same; only where native.available().

    Rows of padding are left out, and the dummy page stays as it is. Pages in block tables are counted from the layer's
    first one.
    """

    name = "native"
    skips_padding = True

    @classmethod
    def of(cls, target: Target, shape: AttentionShape) -> Self:
        """Tiles of fewer rows where a KV head has so many queries that theirs would not stay in a core's cache."""
        row_values = shape.num_heads // shape.num_kv_heads * shape.head_dim
        rows = max(1, min(CPU_TILING.prefill_rows, TILE_VALUES // row_values))
        return cls(replace(CPU_TILING, prefill_rows=rows), target)

    @staticmethod
    def needs(target: Target, shape: AttentionShape) -> str | None:
        if shape.dtype == shape.cache_dtype and native.serves(target, shape.dtype):
            return None
        return (
            "a CPU, float32 or bfloat16 with a KV cache of the same, and a C++ compiler, "
            f"got {target.platform}, {shape.dtype.name} and {shape.cache_dtype.name}"
        )

    def rotate_and_write(
        self, qkv: jax.Array, rotation: Rotation, cache: KVCache[jax.Array], inputs: AttentionInputs, layer: jax.Array
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        rows, kv_heads, width, dim = qkv.shape
        pages, group = cache.pages, width - len(cache.pages)
        first_page = layer * inputs.limits.num_pages
        cos, sin = (jnp.zeros((rows, 0)),) * 2 if rotation is None else rotation
        queries = jax.ShapeDtypeStruct((rows, kv_heads * group, dim), qkv.dtype)
        shapes = [queries, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pages)]
        in_place = {5 + i: 1 + i for i in range(len(pages))}
        call = jax.ffi.ffi_call(native.ROTATE_AND_WRITE, shapes, input_output_aliases=in_place)
        q, *written = call(qkv, cos, sin, inputs.slots, first_page.reshape(1), *pages)
        return q, cache.with_pages(written)

    def recur(
        self, rows: RuleRows, memory: jax.Array, segments: Segments, layer: jax.Array, corrects: bool
    ) -> tuple[jax.Array, jax.Array]:
        """See kernels.recurrent.RunRows; cpu_recurrent.cc."""
        made = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (rows.value, memory)]
        call = jax.ffi.ffi_call(native.RECUR, made, input_output_aliases={5: 1})
        out, memory = call(
            *rows, memory, segments.slots, segments.is_first, layer.reshape(1), corrects=np.bool_(corrects)
        )
        return out, memory

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
        plan, first_page = inputs.plan, layer * inputs.limits.num_pages
        call = jax.ffi.ffi_call(native.ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
        sinks = jnp.zeros(0) if sinks is None else sinks
        return call(
            q, cache.k, cache.pages[-1], inputs.block_tables, first_page.reshape(1), plan.decode, plan.prefill,
            plan.counts, sinks,
            scale=np.float32(scale),
            window=np.int64(NO_WINDOW if reach.window is None else reach.window),
            chunk=np.int64(reach.chunk or 0),
            softcap=np.float32(0.0 if softcap is None else softcap),
        )  # fmt: skip
