"""More cases of make_tiny.py: models with layers whose memory of a sequence does not grow."""

from __future__ import annotations

from tiny_cases import DECODER, TinyCase

DELTA_NET = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
DELTA_NET |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
QWEN3_5 = {"model_type": "qwen3_5_text", **DECODER, **DELTA_NET, "attention_bias": False, "attention_dropout": 0.0}
QWEN3_5 |= {"head_dim": 16, "num_hidden_layers": 4, "pad_token_id": None}
QWEN3_5 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}}
QWEN3_5["layer_types"] = ["linear_attention", "full_attention"] * 2

# A case's place is its seed.
HYBRID_CASES = {
    "qwen3_5_hybrid": TinyCase(
        "Qwen3_5ForCausalLM",
        QWEN3_5,
        layout="transformers 5",
        matters=(
            {"rope_parameters": QWEN3_5["rope_parameters"] | {"partial_rotary_factor": 0.5}},
            {"rope_parameters": QWEN3_5["rope_parameters"] | {"rope_theta": 10000.0}},
        ),
        prompt_length=48,
    ),
}
