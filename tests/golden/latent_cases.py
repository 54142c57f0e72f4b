"""More cases of make_tiny.py: models that attend over latents."""

from __future__ import annotations

from tiny_cases import DECODER, TinyCase

RANKS = {"kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
MOE = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE |= {"moe_layer_freq": 1, "first_k_dense_replace": 1}
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
YARN |= {"mscale": 0.5, "mscale_all_dim": 0.8}
ROPE = {"rope_theta": 10000, "rope_scaling": YARN, "attention_bias": False, "max_position_embeddings": 64}

DEEPSEEK_V2 = {**DECODER, **RANKS, **MOE, **ROPE, "model_type": "deepseek_v2", "num_key_value_heads": 4}
DEEPSEEK_V2 |= {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1}
DEEPSEEK_V2 |= {"topk_group": 1, "routed_scaling_factor": 1.5}
DEEPSEEK_LITE = DEEPSEEK_V2 | {"q_lora_rank": None}
DEEPSEEK_V2 |= {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
DEEPSEEK_V2 |= {"rope_scaling": None, "num_experts_per_tok": 3}

DEEPSEEK_V3 = {**DECODER, **RANKS, **MOE, **ROPE, "model_type": "deepseek_v3", "num_key_value_heads": 4}
DEEPSEEK_V3 |= {"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 2}
DEEPSEEK_V3 |= {"topk_group": 1, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}

GLM4_LITE = {**DECODER, **RANKS, **MOE, "model_type": "glm4_moe_lite", "num_key_value_heads": 4, "n_group": 1}
GLM4_LITE |= {"topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.8}
GLM4_LITE |= {"mlp_layer_types": ["sparse", "dense"]}

YOUTU = {**DECODER, **RANKS, "model_type": "youtu", "num_key_value_heads": 4, "q_lora_rank": None}
YOUTU |= {"rope_interleave": True, "tie_word_embeddings": True}

MINICPM3 = {**DECODER, **RANKS, "model_type": "minicpm3", "num_key_value_heads": 4, "scale_emb": 4, "scale_depth": 0.9}
MINICPM3 |= {"dim_model_base": 16, "tie_word_embeddings": True, "rope_scaling": None, "attention_bias": False}
del MINICPM3["v_head_dim"]

# A case's place is its seed: add new ones at the end.
LATENT_CASES = {
    "deepseek_v2_lite": TinyCase(
        "DeepseekV2ForCausalLM",
        DEEPSEEK_LITE,
        matters=(
            {"rope_scaling": YARN | {"mscale": 0.8}},
            {"rope_scaling": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}},
            {"routed_scaling_factor": 1.0},
        ),
    ),
    "deepseek_v2_groups": TinyCase(
        "DeepseekV2ForCausalLM", DEEPSEEK_V2, matters=({"topk_method": "greedy"}, {"rope_theta": 100})
    ),
    "deepseek_v3_groups": TinyCase(
        "DeepseekV3ForCausalLM",
        DEEPSEEK_V3,
        matters=({"rope_scaling": None}, {"n_group": 1}, {"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}),
    ),
    "glm4_moe_lite_latent": TinyCase(
        "Glm4MoeLiteForCausalLM",
        GLM4_LITE,
        layout="transformers 5",
        matters=({"routed_scaling_factor": 1.0}, {"rope_interleave": False}),
    ),
    "youtu_latent": TinyCase("YoutuForCausalLM", YOUTU, layout="transformers 5", matters=({"rope_interleave": False},)),
    "minicpm3_scaled": TinyCase(
        "MiniCPM3ForCausalLM", MINICPM3, matters=({"scale_emb": 1}, {"scale_depth": 1.4}, {"dim_model_base": 32})
    ),
}
