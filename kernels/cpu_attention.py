"""Native paged attention for CPUs, cpu_attention.cc: what kernels/xla.py does, faster.

There are no gathered copies of the cache, and vector code that XLA does not find for such small products.
"""

from __future__ import annotations

import jax
import numpy as np

from jaxserve.kernels.native import ATTENTION
from jaxserve.kernels.plan import AttentionPlan

NO_WINDOW = np.iinfo(np.int32).max
"""A window that every position lies in."""


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    tables: jax.Array,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """See kernels.xla.paged_attention; float32 or bfloat16, the cache of the same; only where native.available()."""
    call = jax.ffi.ffi_call(ATTENTION, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q, k_pages, v_pages, tables, plan.decode, plan.prefill, plan.counts,
        scale=np.float32(scale),
        window=np.int64(NO_WINDOW if window is None else window),
        softcap=np.float32(0.0 if softcap is None else softcap),
    )  # fmt: skip
