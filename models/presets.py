"""Shapes of well-known models by name, for performance work with random weights (--load-format dummy).

The four models of arXiv 2403.02310's evaluation, one that attends over latents (arXiv 2405.04434) and one of many small
experts, as their config.json on the hub has them.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "sliding_window": 4096, "eos_token_id": 2,
    },
    "yi-34b": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64000, "hidden_size": 7168, "intermediate_size": 20480,
        "num_hidden_layers": 60, "num_attention_heads": 56, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 200000, "rope_theta": 1e7, "eos_token_id": 2,
    },
    "llama2-70b": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "eos_token_id": 2,
    },
    "falcon-180b": {
        "architectures": ["FalconForCausalLM"], "vocab_size": 65024, "hidden_size": 14848, "num_hidden_layers": 80,
        "num_attention_heads": 232, "num_kv_heads": 8, "new_decoder_architecture": True, "eos_token_id": 11,
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400, "hidden_size": 2048,
        "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "topk_method": "greedy", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 163840, "rope_theta": 10000, "eos_token_id": 100001,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707,
        },
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "max_position_embeddings": 40960, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "eos_token_id": 151645,
    },
}  # fmt: skip
