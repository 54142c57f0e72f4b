"""More cases of make_tiny.py: layers whose keys and values are of two shapes, or an earlier layer's."""

from __future__ import annotations

from tiny_cases import DECODER, FULL, SLIDING, TinyCase

ROPE = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA4 = {"model_type": "gemma4_text", **DECODER, "head_dim": 16, "global_head_dim": 32, "sliding_window": 12}
GEMMA4 |= {"hidden_activation": "gelu_pytorch_tanh", "rope_parameters": ROPE, "tie_word_embeddings": True}
GEMMA4 |= {"attention_bias": False, "pad_token_id": 0, "use_bidirectional_attention": None}
DENSE = GEMMA4 | {"num_hidden_layers": 6, "num_kv_shared_layers": 3}
DENSE |= {"layer_types": [SLIDING, SLIDING, FULL] * 2, "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True}
DENSE |= {"vocab_size_per_layer_input": DENSE["vocab_size"], "attention_k_eq_v": False, "enable_moe_block": False}
MOE = GEMMA4 | {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 0}
MOE |= {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
MOE |= {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}
MOE |= {"final_logit_softcapping": 10.0}

# A case's place is its seed: add new ones at the end.
GEMMA4_CASES = {
    "gemma4_shared": TinyCase(
        "Gemma4ForCausalLM",
        DENSE,
        matters=(
            {"sliding_window": 64},
            {"rope_parameters": ROPE | {FULL: ROPE[FULL] | {"partial_rotary_factor": 0.5}}},
            {"rope_parameters": ROPE | {SLIDING: ROPE[SLIDING] | {"rope_theta": 100.0}}},
        ),
    ),
    "gemma4_experts": TinyCase(
        "Gemma4ForCausalLM", MOE, layout="transformers 5", matters=({"sliding_window": 64}, {"top_k_experts": 3})
    ),
}
