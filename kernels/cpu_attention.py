"""Native paged attention for CPUs, cpu_rotate.cc and cpu_attention.cc: what kernels/xla.py does, faster.

There are no gathered copies of the cache, and vector code that XLA does not find for such small products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels.native import ATTENTION, ROTATE_AND_WRITE
from jaxserve.kernels.plan import AttentionPlan

NO_WINDOW = np.iinfo(np.int32).max
"""A window that every position lies in."""


def rotate_and_write(
    qkv: jax.Array,
    rotation: tuple[jax.Array, jax.Array] | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slots: jax.Array,
    layer_page: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See kernels.attention.rotate_and_write; ``layer_page``: the first page of the layer.

    Rows of padding are left out: their queries are whatever was in memory, and the dummy page stays as it is.
    """
    rows, kv_heads, width, dim = qkv.shape
    cos, sin = (jnp.zeros((rows, 0)),) * 2 if rotation is None else rotation
    made = (jax.ShapeDtypeStruct((rows, kv_heads * (width - 2), dim), qkv.dtype), k_pages, v_pages)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in made]
    call = jax.ffi.ffi_call(ROTATE_AND_WRITE, shapes, input_output_aliases={3: 1, 4: 2})
    q, k_pages, v_pages = call(qkv, cos, sin, k_pages, v_pages, slots, layer_page.reshape(1))
    return q, k_pages, v_pages


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    layer_page: jax.Array,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """See kernels.xla.paged_attention; pages in ``tables`` are counted from ``layer_page``. float32 or bfloat16, the
    cache of the same; only where native.available()."""
    call = jax.ffi.ffi_call(ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q, k_pages, v_pages, tables, layer_page.reshape(1), plan.decode, plan.prefill, plan.counts,
        scale=np.float32(scale),
        window=np.int64(NO_WINDOW if window is None else window),
        softcap=np.float32(0.0 if softcap is None else softcap),
    )  # fmt: skip
