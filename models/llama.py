"""The Llama family: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU. Others are variations of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.reshape import (
    by_kv_head,
    head_norm_weights,
    norm_weights,
    outer_weights,
    separate_qkv,
    split_heads,
)
from jaxserve.models.weights import Weight, stacked, whole

DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
MISTRAL_DEFAULTS = DEFAULTS | {
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip


def read(raw: RawConfig, **differences: Any) -> ModelConfig:
    """A config.json with Llama's keys; ``differences`` are fields of ModelConfig that the family has otherwise."""
    num_heads, hidden_size = raw.count("num_attention_heads"), raw.size("hidden_size")
    head_dim = raw.head_dim(hidden_size // num_heads)
    bias = raw.flag("attention_bias")
    fields: dict[str, Any] = {
        "architecture": raw.architecture,
        "vocab_size": raw.size("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": raw.size("intermediate_size"),
        "num_layers": raw.count("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": raw.count("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": raw.integer("max_position_embeddings"),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": raw.flag("mlp_bias"),
        "tie_word_embeddings": raw.flag("tie_word_embeddings"),
    }
    if "norm_eps" not in differences:
        fields["norm_eps"] = raw.number("rms_norm_eps")
    if "activation" not in differences:
        fields["activation"] = raw.activation("hidden_act")
    if "rope" not in differences:
        fields["rope"] = raw.rope(head_dim)
    return ModelConfig(**fields | differences)


def read_windowed(raw: RawConfig) -> ModelConfig:
    """Every layer has the window, where there is one."""
    layers = raw.count("num_hidden_layers")
    return read(raw, windows=raw.windows(layers, ["sliding_attention"] * layers))


LayerWeights = Callable[[ModelConfig, int, str, str], dict[str, Weight]]
"""The weights of a part of layer number ``int``, from our path of the part and the layer's prefix in the file."""


def attention_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    config = config.of_layer(layer)
    theirs += ".self_attn"
    found = {
        f"{ours}.qkv": separate_qkv(config, theirs),
        f"{ours}.out": whole(f"{theirs}.o_proj.weight", partial(split_heads, config)),
    }
    if config.qkv_bias:
        found[f"{ours}.qkv_bias"] = separate_qkv(config, theirs, "bias")
    if config.out_bias:
        found[f"{ours}.out_bias"] = whole(f"{theirs}.o_proj.bias")
    if config.attention_sinks:
        found[f"{ours}.sinks"] = whole(f"{theirs}.sinks", partial(by_kv_head, config))
    return found | head_norm_weights(config, ours, theirs)


def mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    return gated_mlp_weights(config, ours, f"{theirs}.mlp")


def gated_mlp_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    """GatedMLP at ``ours`` from the tensors at ``theirs``."""
    found = {
        f"{ours}.gate_up": stacked(f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"),
        f"{ours}.down": whole(f"{theirs}.down_proj.weight"),
    }
    if config.mlp_bias:
        found[f"{ours}.gate_up_bias"] = stacked(f"{theirs}.gate_proj.bias", f"{theirs}.up_proj.bias")
        found[f"{ours}.down_bias"] = whole(f"{theirs}.down_proj.bias")
    return found


def fused_mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    """Where gate and up are one tensor, without biases."""

    def halves(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(2, -1, tensor.shape[1])

    return {
        f"{ours}.gate_up": whole(f"{theirs}.mlp.gate_up_proj.weight", halves),
        f"{ours}.down": whole(f"{theirs}.mlp.down_proj.weight"),
    }


NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def weights(
    config: ModelConfig,
    *,
    norms: Mapping[str, str] = NORMS,
    attention: LayerWeights = attention_weights,
    mlp: LayerWeights = mlp_weights,
) -> dict[str, Weight]:
    """Of all families with Llama's names; a family gives the parts in which it differs."""
    found = outer_weights(config)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for our_norm, their_norm in norms.items():
            found |= norm_weights(config, f"{ours}.{our_norm}", f"{theirs}.{their_norm}")
        found |= attention(config, i, f"{ours}.attention", theirs)
        found |= mlp(config, i, f"{ours}.mlp", theirs)
    return found


LLAMA = Family(models="Llama 2, 3, 3.x; Yi; SmolLM2", read=read, weights=weights, defaults=DEFAULTS)
MISTRAL = Family(models="Mistral", read=read_windowed, weights=weights, defaults=MISTRAL_DEFAULTS)
