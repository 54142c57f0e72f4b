"""What a step gives a model's attention, as shapes, for reports of what compilers make of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxserve.evaluation.attention_variants import Variant
from jaxserve.kernels.backend import Target
from jaxserve.kernels.cache import KVCache, KVCacheShape
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.kernels.plan import AttentionPlan, PlanLimits, plan_shapes
from jaxserve.kernels.registry import gpu_variants

LAYERS, ROWS, SEQUENCES, MAX_LEN, NUM_PAGES = 32, 2048, 64, 32768, 4096


def cache_and_inputs(
    variant: Variant, backend: str, sharding: Sharding | None = None
) -> tuple[KVCache[jax.ShapeDtypeStruct], AttentionInputs]:
    """Shapes and types of a step's, as ``backend``, one of gpu_variants, wants its work list."""
    chosen = gpu_variants(Target("gpu", variant.capability, 132), variant.shape)[backend]
    limits = PlanLimits(ROWS, SEQUENCES, MAX_LEN, variant.page_size, NUM_PAGES, chosen.tiling, variant.window)

    def array(*size: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    shape = KVCacheShape(LAYERS, variant.kv_heads, variant.head_dim, variant.page_size, variant.shape.cache_dtype)
    pages = array(*shape.pages_shape(NUM_PAGES), dtype=shape.dtype)
    inputs = AttentionInputs(
        slots=array(ROWS),
        block_tables=array(SEQUENCES, -(-MAX_LEN // variant.page_size)),
        plan=AttentionPlan(**{name: array(*size) for name, size in plan_shapes(limits).items()}),
        limits=limits,
        backend=chosen,
        mesh=None,
    )
    return KVCache(pages, pages, array(LAYERS, 2, dtype=jnp.float32)), inputs
