"""Models' attention as far as kernels differ: what is compiled for reports, and run to see whether it is right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxserve.kernels.backend import AttentionShape


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
    chunk: int | None = None
    has_sinks: bool = False
    capability: int = 90

    @property
    def shape(self) -> AttentionShape:
        dtype, cache_dtype = (jnp.dtype(getattr(jnp, name)) for name in (self.dtype, self.cache_dtype))
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.page_size, dtype, cache_dtype)

    @property
    def masking(self) -> dict[str, Any]:
        return {"scale": self.head_dim**-0.5, "window": self.window, "chunk": self.chunk, "softcap": self.softcap}


MISTRAL = Variant()

VARIANTS = {
    "bfloat16 32/8 x 128": MISTRAL,
    "float16": replace(MISTRAL, dtype="float16", cache_dtype="float16"),
    "float8 KV": replace(MISTRAL, cache_dtype="float8_e4m3fn"),
    "pages of 16": replace(MISTRAL, page_size=16),
    "pages of 128": replace(MISTRAL, page_size=128),
    "window": replace(MISTRAL, window=4096),
    "window, pages of 16": replace(MISTRAL, window=4096, page_size=16),
    "soft cap": replace(MISTRAL, softcap=50.0),
    "group 1": replace(MISTRAL, kv_heads=32),
    "group 8": replace(MISTRAL, heads=64),
    "32/8 x 64": replace(MISTRAL, head_dim=64, rotated=64),
    "71/1 x 64": replace(MISTRAL, heads=71, kv_heads=1, head_dim=64, rotated=64),
    "32/32 x 80, part rotated": replace(MISTRAL, kv_heads=32, head_dim=80, rotated=32),
    "32/32 x 96": replace(MISTRAL, kv_heads=32, head_dim=96, rotated=96),
    "16/8 x 256, window, soft cap": replace(
        MISTRAL, heads=16, head_dim=256, rotated=256, window=4096, softcap=50.0
    ),
    "8/1 x 256, not rotated": replace(MISTRAL, heads=8, kv_heads=1, head_dim=256, rotated=0),
    "16/8 x 256, float8 KV, pages of 16": replace(
        MISTRAL, heads=16, head_dim=256, rotated=256, cache_dtype="float8_e4m3fn", page_size=16
    ),
    "64/8 x 64, window, sinks": replace(MISTRAL, heads=64, head_dim=64, rotated=64, window=128, has_sinks=True),
    "40/8 x 128, chunks": replace(MISTRAL, heads=40, chunk=8192),
}  # fmt: skip
"""By what is special about them."""
