"""Falcon: attention and MLP side by side, layer norms, multi-query or grouped-query attention."""

from __future__ import annotations

from functools import partial

from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.parallel import ParallelDecoder
from jaxserve.models.reshape import fused_qkv, norm_weights, outer_weights, split_heads
from jaxserve.models.weights import Weight, whole


def read(raw: RawConfig) -> ModelConfig:
    raw.require("alibi", False)
    raw.require("parallel_attn", True)
    hidden_size, num_heads = raw.size("hidden_size"), raw.count("num_attention_heads")
    head_dim = hidden_size // num_heads
    bias, new = raw.flag("bias"), raw.flag("new_decoder_architecture")
    old_kv_heads = 1 if raw.flag("multi_query") else num_heads
    return ModelConfig(
        architecture=raw.architecture,
        vocab_size=raw.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.size("ffn_hidden_size", 4 * hidden_size),
        num_layers=raw.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.count("num_kv_heads", num_heads) if new else old_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=raw.integer("max_position_embeddings"),
        norm="layer",
        norm_eps=raw.number("layer_norm_epsilon"),
        activation=raw.activation("activation"),
        gated_mlp=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        rope=raw.rope(head_dim),
        num_parallel_norms=raw.integer("num_ln_in_parallel_attn", 2, high=2) if new else 1,
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
    )


def weights(config: ModelConfig) -> dict[str, Weight]:
    found = outer_weights(config, embedding="transformer.word_embeddings", norm="transformer.ln_f")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        if config.num_parallel_norms == 2:
            found |= norm_weights(config, f"{ours}.attention_norm", f"{theirs}.ln_attn")
            found |= norm_weights(config, f"{ours}.mlp_norm", f"{theirs}.ln_mlp")
        else:
            found |= norm_weights(config, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        attention, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
        found |= {
            f"{ours}.attention.qkv": fused_qkv(config, f"{attention}.query_key_value.weight"),
            f"{ours}.attention.out": whole(f"{attention}.dense.weight", partial(split_heads, config)),
            f"{ours}.mlp.up": whole(f"{mlp}.dense_h_to_4h.weight"),
            f"{ours}.mlp.down": whole(f"{mlp}.dense_4h_to_h.weight"),
        }
        if config.qkv_bias:
            found |= {
                f"{ours}.attention.qkv_bias": fused_qkv(config, f"{attention}.query_key_value.bias"),
                f"{ours}.attention.out_bias": whole(f"{attention}.dense.bias"),
                f"{ours}.mlp.up_bias": whole(f"{mlp}.dense_h_to_4h.bias"),
                f"{ours}.mlp.down_bias": whole(f"{mlp}.dense_4h_to_h.bias"),
            }
    return found


FALCON = Family(
    models="Falcon 7B, 40B, 180B; Falcon 2",
    model=ParallelDecoder,
    base="transformer",
    read=read,
    weights=weights,
    defaults={
        "activation": "gelu",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "multi_query": True,
        "parallel_attn": True,
        "tie_word_embeddings": True,
    },
)
