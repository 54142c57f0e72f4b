"""Models' attention as far as kernels differ, for reports of what compilers make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxserve.kernels.attention import AttentionInputs, KVCache
from jaxserve.kernels.backend import AttentionShape, Target, gpu_variants
from jaxserve.kernels.plan import AttentionPlan, PlanLimits, plan_shapes

LAYERS, ROWS, SEQUENCES, MAX_LEN, NUM_PAGES = 32, 2048, 64, 32768, 4096


@dataclass(frozen=True)
class Variant:
    """A model's attention."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    page_size: int = 64
    rotated: int = 128
    """Dimensions that are."""
    window: int | None = None
    softcap: float | None = None
    capability: int = 90
    backend: str = "triton"
    """One of gpu_variants."""

    @property
    def masking(self) -> dict[str, Any]:
        return {"scale": self.head_dim**-0.5, "window": self.window, "softcap": self.softcap}


MISTRAL = Variant()


def cache_and_inputs(
    variant: Variant, backend: str, sharding: Sharding | None = None
) -> tuple[KVCache[jax.ShapeDtypeStruct], AttentionInputs]:
    """Shapes and types of a step's, as ``backend`` wants its work list."""
    dtype, cache_dtype = (jnp.dtype(getattr(jnp, name)) for name in (variant.dtype, variant.cache_dtype))
    shape = AttentionShape(variant.heads, variant.kv_heads, variant.head_dim, variant.page_size, dtype, cache_dtype)
    chosen = gpu_variants(Target("gpu", variant.capability, 132), shape)[backend]
    limits = PlanLimits(ROWS, SEQUENCES, MAX_LEN, variant.page_size, NUM_PAGES, chosen.tiling, variant.window)

    def array(*size: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    pages = array(LAYERS * NUM_PAGES, variant.page_size, variant.kv_heads, variant.head_dim, dtype=cache_dtype)
    inputs = AttentionInputs(
        slots=array(ROWS),
        block_tables=array(SEQUENCES, -(-MAX_LEN // variant.page_size)),
        plan=AttentionPlan(**{name: array(*size) for name, size in plan_shapes(limits).items()}),
        num_pages=NUM_PAGES,
        backend=chosen,
    )
    return KVCache(pages, pages, array(LAYERS, 2, dtype=jnp.float32)), inputs
