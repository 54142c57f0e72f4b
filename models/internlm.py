"""InternLM: Llama with biases (1), and with other tensor names and a fused projection (2)."""

from __future__ import annotations

from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.reshape import fused_qkv, norm_weights, outer_weights, split_heads
from jaxserve.models.weights import Weight, stacked, whole


def read(raw: RawConfig) -> ModelConfig:
    bias = raw.flag("bias")
    return llama.read(raw, qkv_bias=bias, out_bias=bias)


def weights(config: ModelConfig) -> dict[str, Weight]:
    found = outer_weights(config, embedding="model.tok_embeddings", head="output")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.attention", f"{theirs}.feed_forward"
        found |= norm_weights(config, f"{ours}.attention_norm", f"{theirs}.attention_norm")
        found |= norm_weights(config, f"{ours}.mlp_norm", f"{theirs}.ffn_norm")
        found[f"{ours}.attention.qkv"] = fused_qkv(config, f"{attention}.wqkv.weight")
        found[f"{ours}.attention.out"] = whole(f"{attention}.wo.weight", partial(split_heads, config))
        if config.qkv_bias:
            found[f"{ours}.attention.qkv_bias"] = fused_qkv(config, f"{attention}.wqkv.bias")
            found[f"{ours}.attention.out_bias"] = whole(f"{attention}.wo.bias")
        found[f"{ours}.mlp.gate_up"] = stacked(f"{mlp}.w1.weight", f"{mlp}.w3.weight")
        found[f"{ours}.mlp.down"] = whole(f"{mlp}.w2.weight")
    return found


_DEFAULTS = llama.DEFAULTS | {"bias": True}
INTERNLM = Family(models="InternLM", read=read, weights=llama.weights, defaults=_DEFAULTS)
INTERNLM2 = Family(models="InternLM2, 2.5", read=read, weights=weights, defaults=_DEFAULTS)
