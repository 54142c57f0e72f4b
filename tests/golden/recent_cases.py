"""The random models of make_tiny.py that came later: families of 2024 and 2025."""

from __future__ import annotations

import torch
from tiny_cases import DECODER, FULL, LLAMA3, SLIDING, TinyCase

SMOLLM3 = {"model_type": "smollm3", **DECODER, "no_rope_layers": [1, 0], "no_rope_layer_interval": 4}
SMOLLM3 |= {
    "pad_token_id": 0,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 5000000.0,
    "rope_scaling": None,
}
SMOLLM3 |= {"use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True}

MINISTRAL3_ROPE = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
MINISTRAL3_ROPE |= {"original_max_position_embeddings": 12, "mscale": 1.0, "mscale_all_dim": 1.0}
MINISTRAL3_ROPE |= {"llama_4_scaling_beta": 0.5}
MINISTRAL3 = {"model_type": "ministral3", **DECODER, "head_dim": 16, "max_position_embeddings": 48}
MINISTRAL3 |= {"rope_parameters": MINISTRAL3_ROPE, "sliding_window": None}

OLMO2 = {"model_type": "olmo2", **DECODER, "attention_bias": False, "rope_theta": 500000, "rope_scaling": None}
OLMO3 = {"model_type": "olmo3", **DECODER, "attention_bias": False, "rope_theta": 500000, "sliding_window": 12}
OLMO3 |= {"layer_types": [SLIDING, FULL], "max_position_embeddings": 64}
OLMO3_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32}
OLMO3 |= {"rope_scaling": OLMO3_YARN | {"beta_slow": 1, "attention_factor": 1.2}}
EXAONE4 = {"model_type": "exaone4", **DECODER, "head_dim": 16, "rope_theta": 1000000, "rope_scaling": LLAMA3}
EXAONE4 |= {"sliding_window": 12, "sliding_window_pattern": "LG", "layer_types": [SLIDING, FULL]}

GLM4 = {"model_type": "glm4", **DECODER, "attention_bias": True, "head_dim": 16, "partial_rotary_factor": 0.5}
GLM4 |= {"rope_theta": 10000.0, "pad_token_id": 0}
GLM4_MOE = GLM4 | {"model_type": "glm4_moe", "first_k_dense_replace": 1, "moe_intermediate_size": 16}
GLM4_MOE |= {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
GLM4_MOE |= {"norm_topk_prob": True, "routed_scaling_factor": 1.5, "use_qk_norm": True, "rope_scaling": None}
GLM4_MOE |= {"num_nextn_predict_layers": 1}

GRANITE = {"model_type": "granite", **DECODER, "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0}
GRANITE |= {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4}
GRANITE |= {"logits_scaling": 2.0, "rope_scaling": None, "tie_word_embeddings": True}

SEED_OSS = {"model_type": "seed_oss", **DECODER, "attention_bias": True, "attention_out_bias": False, "head_dim": 16}
SEED_OSS |= {
    "mlp_bias": False,
    "residual_dropout": 0.1,
    "rope_theta": 10000000.0,
    "rope_scaling": {"rope_type": "default"},
}

COHERE2 = {"model_type": "cohere2", **DECODER, "layer_norm_eps": 1e-3, "logit_scale": 0.5, "rope_theta": 50000}
COHERE2 |= {"sliding_window": 12, "sliding_window_pattern": 2, "attention_bias": False, "tie_word_embeddings": True}
del COHERE2["rms_norm_eps"]

QWEN2_MOE = {"model_type": "qwen2_moe", **DECODER, "rope_theta": 1000000.0, "decoder_sparse_step": 1}
QWEN2_MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 8}
QWEN2_MOE |= {"num_experts_per_tok": 2, "norm_topk_prob": False, "use_sliding_window": False, "sliding_window": 12}
QWEN2_MOE |= {"max_window_layers": 2}

PHIMOE = {"model_type": "phimoe", **DECODER, "attention_bias": True, "lm_head_bias": True, "num_local_experts": 4}
PHIMOE |= {"num_experts_per_tok": 2, "router_jitter_noise": 0.2, "input_jitter_noise": 0.01, "rope_theta": 10000.0}
PHIMOE |= {"sliding_window": 128, "original_max_position_embeddings": 64}
PHIMOE_ROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.0, 3.0, 4.0]}
PHIMOE_ROPE |= {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 64}
PHIMOE |= {"rope_scaling": PHIMOE_ROPE}

LLAMA4 = {"model_type": "llama4_text", **DECODER, "attention_bias": False, "head_dim": 16, "num_hidden_layers": 4}
LLAMA4 |= {"intermediate_size": 16, "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 1}
LLAMA4 |= {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0, 1, 0], "use_qk_norm": True, "rope_theta": 500000.0}
LLAMA4 |= {"rope_scaling": LLAMA3, "attention_chunk_size": 20, "attn_temperature_tuning": True, "floor_scale": 12}
LLAMA4 |= {"attn_scale": 0.5}

GPT_OSS = {"model_type": "gpt_oss", **DECODER, "attention_bias": True, "head_dim": 16, "intermediate_size": 32}
GPT_OSS |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12, "rope_theta": 150000}
GPT_OSS |= {"swiglu_alpha": 1.702, "swiglu_limit": 0.5, "layer_types": [SLIDING, FULL], "initial_context_length": 48}
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48, "truncate": False}
GPT_OSS |= {"rope_scaling": GPT_OSS_ROPE | {"beta_fast": 32.0, "beta_slow": 1.0}, "max_position_embeddings": 192}

# A case's place, behind those of tiny_cases.py, is its seed: add new ones at the end.
RECENT_CASES = {
    "smollm3_nope": TinyCase("SmolLM3ForCausalLM", SMOLLM3, matters=({"no_rope_layers": [1, 1]},)),
    "ministral3_yarn": TinyCase(
        "Ministral3ForCausalLM",
        MINISTRAL3,
        matters=(
            {"rope_parameters": MINISTRAL3_ROPE | {"llama_4_scaling_beta": 0.0}},
            {"rope_parameters": MINISTRAL3_ROPE | {"factor": 1.0}},
        ),
    ),
    "olmo2_norms": TinyCase("Olmo2ForCausalLM", OLMO2, matters=({"rope_theta": 100.0},)),
    "olmo3_windows": TinyCase(
        "Olmo3ForCausalLM", OLMO3, matters=({"sliding_window": 64}, {"rope_scaling": None}, {"layer_types": [FULL] * 2})
    ),
    "exaone4_hybrid": TinyCase(
        "Exaone4ForCausalLM", EXAONE4, matters=({"layer_types": [SLIDING] * 2}, {"sliding_window": 64})
    ),
    "glm4_partial": TinyCase("Glm4ForCausalLM", GLM4, matters=({"partial_rotary_factor": 1.0},)),
    "glm4_moe_groups": TinyCase(
        "Glm4MoeForCausalLM",
        GLM4_MOE,
        matters=({"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"n_group": 1}),
    ),
    "granite_multipliers": TinyCase(
        "GraniteForCausalLM",
        GRANITE,
        matters=tuple(
            {name: 1.0}
            for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        ),
    ),
    "seed_oss_bias": TinyCase("SeedOssForCausalLM", SEED_OSS),
    "cohere2_parallel": TinyCase(
        "Cohere2ForCausalLM",
        COHERE2,
        matters=({"logit_scale": 1.0}, {"sliding_window": 64}, {"sliding_window_pattern": 3}),
    ),
    "qwen2_moe_shared": TinyCase(
        "Qwen2MoeForCausalLM", QWEN2_MOE, matters=({"norm_topk_prob": True}, {"num_experts_per_tok": 3})
    ),
    "phimoe_mixer": TinyCase(
        "PhimoeForCausalLM",
        PHIMOE,
        matters=({"router_jitter_noise": 0.0}, {"rope_scaling": PHIMOE_ROPE | {"short_mscale": 1.0}}),
        dtype=torch.bfloat16,
    ),
    "llama4_experts": TinyCase(
        "Llama4ForCausalLM",
        LLAMA4,
        matters=(
            {"attn_temperature_tuning": False},
            {"no_rope_layers": [1, 1, 1, 0]},
            {"use_qk_norm": False},
            {"attention_chunk_size": 8192},
            {"num_experts_per_tok": 2},
            {"rope_scaling": None},
        ),
    ),
    "gpt_oss_sinks": TinyCase(
        "GptOssForCausalLM",
        GPT_OSS,
        matters=(
            {"swiglu_limit": 7.0},
            {"swiglu_alpha": 1.0},
            {"sliding_window": 64},
            {"rope_scaling": GPT_OSS["rope_scaling"] | {"truncate": True}},
        ),
    ),
}
