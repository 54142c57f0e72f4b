"""Phi-3 and Phi-4: Llama with fused projections, long contexts by longrope, heads that may be rotated in part."""

from __future__ import annotations

from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.reshape import consecutive_qkv, split_heads
from jaxserve.models.weights import Weight, whole


def _attention_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    return {
        f"{ours}.qkv": consecutive_qkv(config, f"{theirs}.self_attn.qkv_proj.weight"),
        f"{ours}.out": whole(f"{theirs}.self_attn.o_proj.weight", partial(split_heads, config)),
    }


_DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
PHI3 = Family(
    models="Phi-3, Phi-4",
    read=llama.read_windowed,
    weights=partial(llama.weights, attention=_attention_weights, mlp=llama.fused_mlp_weights),
    defaults=_DEFAULTS,
)
