"""DeepSeek V2 and V3, and who builds as they do: attention over latents, and experts beside one for all tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models import llama
from jaxserve.models.config import Experts, Latent, ModelConfig, SharedExpert
from jaxserve.models.family import Family, language_model_name
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.latent import LatentDecoder, latent_weights
from jaxserve.models.qwen import moe_or_mlp_weights
from jaxserve.models.rope import score_magnitude

MLP_TYPES = ("dense", "sparse")


def read_experts(raw: RawConfig, **differences: Any) -> Experts:
    """Of a config.json with DeepSeek's keys."""
    inner, shared = raw.size("moe_intermediate_size"), raw.count("n_shared_experts")
    return Experts(
        # transformers 5 may write the first name, the hub's files have the second.
        count=raw.count("num_local_experts" if raw.has("num_local_experts") else "n_routed_experts"),
        per_token=raw.count("num_experts_per_tok"),
        intermediate_size=inner,
        layers=_sparse_layers(raw),
        scale=raw.number("routed_scaling_factor"),
        shared=SharedExpert(intermediate_size=shared * inner, gated=False),
        **differences,
    )


def read_balanced_experts(raw: RawConfig) -> Experts:
    """Those of V3, whose load a bias balances (arXiv 2412.19437)."""
    raw.choice("scoring_func", ("sigmoid",), "sigmoid")
    raw.choice("topk_method", ("noaux_tc",), "noaux_tc")
    return read_experts(
        raw,
        router="grouped_sigmoid",
        normalise=raw.flag("norm_topk_prob"),
        num_groups=raw.count("n_group"),
        groups_per_token=raw.count("topk_group"),
        choice_bias=True,
    )


def _sparse_layers(raw: RawConfig) -> tuple[int, ...]:
    """Those that have experts: named one by one, or all but the first ones."""
    layers, dense = raw.count("num_hidden_layers"), raw.integer("first_k_dense_replace", low=0)
    if raw.integer("moe_layer_freq", 1) != 1:
        raise raw.error("moe_layer_freq", "1")
    types = raw.texts("mlp_layer_types") or [MLP_TYPES[i >= dense] for i in range(layers)]
    if len(types) != layers or not set(types) <= set(MLP_TYPES):
        raise raw.error("mlp_layer_types", f"{layers} of {' and '.join(MLP_TYPES)}")
    return tuple(i for i, kind in enumerate(types) if kind == "sparse")


def read_latent(raw: RawConfig, **differences: Any) -> ModelConfig:
    """A config.json with DeepSeek's keys; see llama.read."""
    if raw.has("index_topk"):
        raise ModelError(
            f"{raw.where}: {raw.prefix}index_topk {raw.integer('index_topk')}: sparse attention, whose keys an indexer "
            "chooses as in DeepSeek V3.2, is not supported"
        )
    raw.require("attention_bias", False)
    raw.require("mlp_bias", False)
    latent = Latent(
        rank=raw.size("kv_lora_rank"),
        query_rank=raw.size("q_lora_rank") if raw.has("q_lora_rank") else None,
        key_dim=raw.size("qk_nope_head_dim"),
        value_dim=raw.size("v_head_dim", raw.size("hidden_size") // raw.count("num_attention_heads")),
    )
    rope_dim = raw.size("qk_rope_head_dim")
    rope = raw.rope(rope_dim, interleaved=raw.flag("rope_interleave", True))
    return llama.read(
        raw,
        num_kv_heads=1,
        head_dim=latent.rank + rope_dim,
        latent=latent,
        rope=rope,
        attention_scale=(latent.key_dim + rope_dim) ** -0.5 * score_magnitude(rope),
        **differences,
    )


def read_v2(raw: RawConfig) -> ModelConfig:
    raw.choice("scoring_func", ("softmax",), "softmax")
    raw.require("norm_topk_prob", False)  # DeepSeek's code scales then or normalises, transformers only scales
    grouped = raw.choice("topk_method", ("greedy", "group_limited_greedy")) == "group_limited_greedy"
    groups = {"num_groups": raw.count("n_group"), "groups_per_token": raw.count("topk_group")} if grouped else {}
    return read_latent(raw, experts=read_experts(raw, normalise=False, **groups))


def read_v3(raw: RawConfig) -> ModelConfig:
    return read_latent(raw, experts=read_balanced_experts(raw))


RANKS = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_V2 = llama.DEFAULTS | RANKS | {
    "first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407,
    "routed_scaling_factor": 1.0, "topk_method": "greedy", "norm_topk_prob": False,
}  # fmt: skip
_V3 = llama.DEFAULTS | RANKS | {
    "max_position_embeddings": 4096, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
WEIGHTS = partial(
    llama.weights, attention=latent_weights, mlp=partial(moe_or_mlp_weights, shared="shared_experts")
)  # fmt: skip

DEEPSEEK_V2 = Family(models="DeepSeek V2, V2-Lite", read=read_v2, weights=WEIGHTS, model=LatentDecoder, defaults=_V2)
DEEPSEEK_V3 = Family(
    models="DeepSeek V3, V3.1, R1; Kimi K2; Moonlight",
    read=read_v3,
    weights=WEIGHTS,
    model=LatentDecoder,
    defaults=_V3,
    has_later_layers=True,
)
KIMI_VISION = replace(
    DEEPSEEK_V3,
    models="Kimi K2.5 that can see, on text alone",
    nested="text_config",
    tensor_name=language_model_name,
)
YOUTU = Family(
    models="Youtu-LLM",
    read=read_latent,
    weights=partial(llama.weights, attention=latent_weights),
    model=LatentDecoder,
    defaults=llama.DEFAULTS | RANKS | {"max_position_embeddings": 131072, "tie_word_embeddings": True},
)
