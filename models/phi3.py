"""Phi-3 and Phi-4: Llama with fused projections, long contexts by longrope, heads that may be rotated in part."""

from __future__ import annotations

from functools import partial

import numpy as np

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.layers import consecutive_qkv, norm_weights, split_heads
from jaxserve.models.weights import Weight, whole


def weights(config: ModelConfig) -> dict[str, Weight]:
    def halves(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(2, -1, tensor.shape[1])

    found = llama.outer_weights(config)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        found |= norm_weights(config, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        found |= norm_weights(config, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        found |= {
            f"{ours}.attention.qkv": consecutive_qkv(config, f"{theirs}.self_attn.qkv_proj.weight"),
            f"{ours}.attention.out": whole(f"{theirs}.self_attn.o_proj.weight", partial(split_heads, config)),
            f"{ours}.mlp.gate_up": whole(f"{theirs}.mlp.gate_up_proj.weight", halves),
            f"{ours}.mlp.down": whole(f"{theirs}.mlp.down_proj.weight"),
        }
    return found


_DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
PHI3 = Family(models="Phi-3, Phi-4", read=llama.read_windowed, weights=weights, defaults=_DEFAULTS)
