"""GLM-4: heads rotated in part, biases on query, key and value; norms on both sides, or experts (4.5), or experts and
attention over latents (4.7-Flash)."""

from __future__ import annotations

from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.deepseek import RANKS, WEIGHTS, read_balanced_experts, read_v3
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.latent import LatentDecoder
from jaxserve.models.qwen import moe_or_mlp_weights


def read_glm4(raw: RawConfig) -> ModelConfig:
    head_dim = raw.head_dim(raw.size("hidden_size") // raw.count("num_attention_heads"))
    return llama.read(raw, out_bias=False, norm_places="around", rope=raw.rope(head_dim, interleaved=True))


def read_glm4_moe(raw: RawConfig) -> ModelConfig:
    qk_norm = "head" if raw.flag("use_qk_norm") else None
    return llama.read(raw, out_bias=False, qk_norm=qk_norm, experts=read_balanced_experts(raw))


_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
_GLM = llama.DEFAULTS | {"max_position_embeddings": 131072, "partial_rotary_factor": 0.5}
_GLM4 = _GLM | {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True}
_EXPERTS = {
    "rms_norm_eps": 1e-5, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}  # fmt: skip
_GLM4_MOE = _GLM | _EXPERTS | {
    "num_key_value_heads": 8, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
_GLM4_LITE = llama.DEFAULTS | RANKS | _EXPERTS | {
    "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256, "max_position_embeddings": 202752,
    "moe_intermediate_size": 1536, "num_experts_per_tok": 4, "n_routed_experts": 64, "routed_scaling_factor": 1.8,
}  # fmt: skip

GLM4 = Family(
    models="GLM-4 (0414)",
    read=read_glm4,
    weights=partial(llama.weights, norms=_NORMS, mlp=llama.fused_mlp_weights),
    defaults=_GLM4,
)
GLM4_MOE = Family(
    models="GLM-4.5, 4.6, 4.7",
    read=read_glm4_moe,
    weights=partial(llama.weights, mlp=partial(moe_or_mlp_weights, shared="shared_experts")),
    defaults=_GLM4_MOE,
    has_later_layers=True,
)
GLM4_LITE = Family(
    models="GLM-4.7-Flash",
    read=read_v3,
    weights=WEIGHTS,
    model=LatentDecoder,
    defaults=_GLM4_LITE,
    has_later_layers=True,
)
