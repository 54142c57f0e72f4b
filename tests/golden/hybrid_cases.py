"""More cases of make_tiny.py: models with layers whose memory of a sequence does not grow."""

from __future__ import annotations

import re

import torch
from recent_cases import GRANITE
from tiny_cases import DECODER, Config, Tensors, TinyCase

DELTA_NET = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
DELTA_NET |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
QWEN3_5 = {"model_type": "qwen3_5_text", **DECODER, **DELTA_NET, "attention_bias": False, "attention_dropout": 0.0}
QWEN3_5 |= {"head_dim": 16, "num_hidden_layers": 4, "pad_token_id": None}
QWEN3_5 |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}}
QWEN3_5["layer_types"] = ["linear_attention", "full_attention"] * 2

GRANITE4 = {**GRANITE, "model_type": "granitemoehybrid", "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 8}
GRANITE4 |= {"mamba_d_head": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True}
GRANITE4 |= {"mamba_proj_bias": False, "mamba_chunk_size": 16, "position_embedding_type": "nope"}
GRANITE4 |= {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
GRANITE4 |= {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}

QWEN3_NEXT = QWEN3_5 | {"model_type": "qwen3_next", "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
QWEN3_NEXT |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
QWEN3_NEXT |= {"mlp_only_layers": [], "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}

QWEN3_5_MOE = QWEN3_5 | {"model_type": "qwen3_5_moe_text", "num_experts": 8, "num_experts_per_tok": 2}
QWEN3_5_MOE |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_hidden_layers": 2}
QWEN3_5_MOE |= {"layer_types": ["linear_attention", "full_attention"]}
del QWEN3_5_MOE["intermediate_size"]


def fuse_experts(tensors: Tensors, _config: Config) -> Tensors:
    """All experts' matrices in one tensor, gates and ups together, as the hub's files of Qwen3.5 have them."""
    fused = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.experts\.\d", name)}
    for prefix in {match[1] for name in tensors if (match := re.match(r"(.*\.experts)\.\d", name))}:
        count = sum(bool(re.fullmatch(rf"{re.escape(prefix)}\.\d+\.up_proj\.weight", name)) for name in tensors)
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{i}.{kind}_proj.weight"] for i in range(count)])
            for kind in ("gate", "up", "down")
        )
        fused |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return fused


# A case's place is its seed: add new ones at the end.
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
    "granite4_hybrid": TinyCase("GraniteMoeHybridForCausalLM", GRANITE4, prompt_length=48),
    "qwen3_next_hybrid": TinyCase("Qwen3NextForCausalLM", QWEN3_NEXT, layout="transformers 5", prompt_length=48),
    "qwen3_5_moe_hybrid": TinyCase(
        "Qwen3_5MoeForCausalLM", QWEN3_5_MOE, layout="transformers 5", prompt_length=48, to_hub=fuse_experts
    ),
}
