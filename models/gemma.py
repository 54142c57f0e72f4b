"""Gemma: norms around 1, scaled embeddings, GELU; norms on both sides, windows and soft caps (2); q/k norms (3)."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family, language_model_name
from jaxserve.models.hf_config import RawConfig, all_but_every


def read_gemma(raw: RawConfig, **differences: Any) -> ModelConfig:
    # Old files say "gelu" and mean its tanh form, which every Gemma was trained with.
    return llama.read(
        raw,
        norm="rms_plus_one",
        activation="gelu_tanh",
        embedding_scale=raw.size("hidden_size") ** 0.5,
        **differences,
    )


def read_gemma2(raw: RawConfig, **differences: Any) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return read_gemma(
        raw,
        norm_places="around",
        attention_scale=raw.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=raw.optional_number("attn_logit_softcapping"),
        logits_softcap=raw.optional_number("final_logit_softcapping"),
        **{"windows": raw.windows(layers, alternating)} | differences,
    )


def read_gemma3(raw: RawConfig) -> ModelConfig:
    raw.require("use_bidirectional_attention", False)
    layers, every = raw.count("num_hidden_layers"), raw.integer("sliding_window_pattern")
    head_dim = raw.head_dim()
    return read_gemma2(
        raw,
        windows=raw.windows(layers, all_but_every(every, layers)),
        qk_norm="head",
        rope=raw.rope(head_dim, layers="full_attention"),
        local_rope=raw.local_rope(head_dim, raw.number("rope_local_base_freq")),
    )


_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
weights_gemma2 = partial(llama.weights, norms=_NORMS)


_GEMMA = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "head_dim": 256, "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "num_key_value_heads": 4, "num_attention_heads": 8, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | {
    "max_position_embeddings": 131072, "vocab_size": 262208, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip

GEMMA = Family(models="Gemma", read=read_gemma, weights=llama.weights, defaults=_GEMMA)
GEMMA2 = Family(models="Gemma 2", read=read_gemma2, weights=weights_gemma2, defaults=_GEMMA2)
GEMMA3 = Family(models="Gemma 3", read=read_gemma3, weights=weights_gemma2, defaults=_GEMMA3)
GEMMA3_VISION = Family(
    models="Gemma 3 that can see, on text alone",
    read=read_gemma3,
    weights=weights_gemma2,
    defaults=_GEMMA3,
    nested="text_config",
    tensor_name=language_model_name,
)
