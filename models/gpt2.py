"""GPT-2: learned positions, layer norms, a plain MLP; weights inputs-first (transformers' Conv1D)."""

from __future__ import annotations

import re

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.reshape import consecutive_qkv, norm_weights, outer_weights, split_heads
from jaxserve.models.weights import Weight, whole


def read(raw: RawConfig) -> ModelConfig:
    raw.require("scale_attn_weights", True)
    raw.require("scale_attn_by_inverse_layer_idx", False)
    raw.require("add_cross_attention", False)
    hidden_size, num_heads = raw.size("n_embd"), raw.count("n_head")
    return ModelConfig(
        architecture=raw.architecture,
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("n_inner", 4 * hidden_size),
        num_layers=raw.count("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=raw.size("n_positions"),
        norm="layer",
        norm_eps=raw.number("layer_norm_epsilon"),
        activation=raw.activation("activation_function"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    def outputs_first(tensor: np.ndarray) -> np.ndarray:
        return tensor.T

    def out_projection(tensor: np.ndarray) -> np.ndarray:
        return split_heads(config, tensor.T)

    found = outer_weights(config, embedding="transformer.wte", norm="transformer.ln_f")
    found["positions"] = whole("transformer.wpe.weight")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        found |= norm_weights(config, f"{ours}.attention_norm", f"{theirs}.ln_1")
        found |= norm_weights(config, f"{ours}.mlp_norm", f"{theirs}.ln_2")
        found |= {
            f"{ours}.attention.qkv": consecutive_qkv(config, f"{theirs}.attn.c_attn.weight", outputs_last=True),
            f"{ours}.attention.qkv_bias": consecutive_qkv(config, f"{theirs}.attn.c_attn.bias"),
            f"{ours}.attention.out": whole(f"{theirs}.attn.c_proj.weight", out_projection),
            f"{ours}.attention.out_bias": whole(f"{theirs}.attn.c_proj.bias"),
            f"{ours}.mlp.up": whole(f"{theirs}.mlp.c_fc.weight", outputs_first),
            f"{ours}.mlp.up_bias": whole(f"{theirs}.mlp.c_fc.bias"),
            f"{ours}.mlp.down": whole(f"{theirs}.mlp.c_proj.weight", outputs_first),
            f"{ours}.mlp.down_bias": whole(f"{theirs}.mlp.c_proj.bias"),
        }
    return found


def tensor_name(name: str) -> str | None:
    """Old files carry the causal mask."""
    return None if re.fullmatch(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", name) else name


GPT2 = Family(
    models="GPT-2",
    base="transformer",
    read=read,
    weights=weights,
    tensor_name=tensor_name,
    defaults={
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
)
