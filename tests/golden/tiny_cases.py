"""The tiny models of make_tiny.py: the config.json of each, and what its safetensors file needs beyond transformers'.

Keys and layout of "hub" cases are those of the family's config.json on the Hugging Face hub, where many files are
older than transformers 5; README.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class TinyCase:
    """One random model; `prompt_length` + 16 greedy tokens are evaluated."""

    architecture: str
    config: Config  # config.json, but for architectures and torch_dtype
    layout: Literal["hub", "transformers 4", "transformers 5"] = "hub"  # config as it is, or as transformers saves it
    matters: tuple[Config, ...] = ()  # changes to the configuration, each of which must change the logits
    prompt_length: int = 32
    dtype: torch.dtype = torch.bfloat16  # of the weights in the file; everything is computed in float32
    computed_as: Config | None = None  # for transformers, where it does not know the architecture
    to_hub: Callable[[Tensors, Config], Tensors] | None = None  # from transformers' tensor names to the hub's


def fuse_internlm2(tensors: Tensors, config: Config) -> Tensors:
    """Llama's tensors as InternLM2's: other names; q, k and v fused, each KV head's query heads, key and value."""
    renames = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    kv_heads, hidden_size = config["num_key_value_heads"], config["hidden_size"]
    head_dim = hidden_size // config["num_attention_heads"]
    fused = {}
    for name, tensor in tensors.items():
        if name.endswith(".q_proj.weight"):
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            rows = torch.cat([part.view(kv_heads, -1, head_dim, hidden_size) for part in parts], dim=1)
            fused[name.replace("self_attn.q_proj", "attention.wqkv")] = rows.reshape(-1, hidden_size)
        elif not name.endswith((".k_proj.weight", ".v_proj.weight")):
            stem = name.removesuffix(".weight")
            found = [old for old in renames if stem == old or stem.endswith(f".{old}")]
            fused[name.replace(found[0], renames[found[0]]) if found else name] = tensor
    return fused


def add_lm_head(tensors: Tensors, _config: Config) -> Tensors:
    """With the output head besides the embedding that it is tied to, as shards saved without transformers have."""
    return {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}


def strip_gpt2(tensors: Tensors, config: Config) -> Tensors:
    """The hub's gpt2 was saved from the model without its head, when causal masks were part of the state."""
    size = config["n_positions"]
    mask = torch.ones(size, size).tril().view(1, 1, size, size)
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(config["n_layer"])}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def llama(
    heads: int,
    kv_heads: int,
    head_dim: int = 8,
    layers: int = 2,
    tied: bool = False,
    bias: bool = False,
    max_positions: int = 128,
    rope: Config | None = None,
    **rest: Any,
) -> TinyCase:
    """A Llama in transformers' own layout."""
    config = {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": bias,
        "rope_parameters": {"rope_theta": 1000.0, **(rope or {"rope_type": "default"})},
    }
    return TinyCase("LlamaForCausalLM", config, **{"layout": "transformers 5", "prompt_length": 48} | rest)


ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, **ORIGINAL}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.0, 3.0, 4.0]}

# head_dim 8 with rope_theta 1000 turns by 1, 0.18, 0.03, 0.006 rad a token: over 64 tokens every kind of scaling shows.
LLAMA_CASES = {
    "llama_mha_untied": llama(heads=4, kv_heads=4, dtype=torch.float32),
    "llama_gqa_tied": llama(heads=4, kv_heads=2, layers=3, tied=True, dtype=torch.float32),
    "llama_mqa_bias": llama(heads=4, kv_heads=1, bias=True, dtype=torch.float32, layout="transformers 4"),
    "llama_gqa_wide_heads": llama(heads=4, kv_heads=2, head_dim=16),  # heads * head_dim != hidden_size
    "llama_rope_linear": llama(heads=4, kv_heads=2, tied=True, rope={"rope_type": "linear", "factor": 4.0}),
    "llama_rope_dynamic": llama(heads=4, kv_heads=2, max_positions=32, rope={"rope_type": "dynamic", "factor": 4.0}),
    "llama_rope_yarn": llama(heads=4, kv_heads=2, head_dim=16, tied=True, rope=YARN),
    "llama_rope_longrope_short": llama(heads=4, kv_heads=1, prompt_length=16, tied=True, rope=LONGROPE),
    "llama_rope_longrope_long": llama(heads=4, kv_heads=2, tied=True, rope=LONGROPE, layout="transformers 4"),
    "llama_rope_llama3": llama(heads=4, kv_heads=2, head_dim=16, tied=True, rope=LLAMA3, layout="transformers 4"),
}

# Epsilons are larger than anybody's, so that one that was not read shows.
SMALL = {"vocab_size": 96, "hidden_size": 32, "initializer_range": 0.02, "use_cache": True}
SIZES = SMALL | {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
DECODER = SIZES | {"max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-3}
DECODER |= {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}

MISTRAL = {"model_type": "mistral", **DECODER, "rope_theta": 10000.0}
YI = {"model_type": "llama", **DECODER, "pad_token_id": 0, "rope_scaling": None, "rope_theta": 5000000.0}
YI |= {"hidden_size": 64, "num_attention_heads": 8}
INTERNLM = {"model_type": "internlm", **DECODER, "bias": True, "pad_token_id": 2, "num_attention_heads": 4}
del INTERNLM["num_key_value_heads"]
INTERNLM2 = {"model_type": "internlm2", **DECODER, "bias": False, "pad_token_id": 2, "rope_theta": 1000000}
INTERNLM2 |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"}

QWEN = DECODER | {"attention_dropout": 0.0, "rope_theta": 1000000.0}
QWEN2 = {"model_type": "qwen2", **QWEN, "max_window_layers": 1, "sliding_window": 12, "use_sliding_window": False}
QWEN3 = {"model_type": "qwen3", **QWEN, "attention_bias": False, "head_dim": 16, "rope_scaling": None}
QWEN3 |= {"max_window_layers": 2, "sliding_window": None, "use_sliding_window": False}
QWEN3_MOE = QWEN3 | {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "output_router_logits": False}
QWEN3_MOE |= {"router_aux_loss_coef": 0.001}
MIXTRAL = {"model_type": "mixtral", **DECODER, "attention_dropout": 0.0, "rope_theta": 1000000.0}
MIXTRAL |= {"num_experts_per_tok": 2, "num_local_experts": 4, "output_router_logits": False, "sliding_window": None}
MIXTRAL |= {"router_aux_loss_coef": 0.02}

FALCON = {"model_type": "falcon", **SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
FALCON |= {"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0}
FALCON |= {"bias": False, "bos_token_id": 11, "eos_token_id": 11, "layer_norm_epsilon": 1e-3, "parallel_attn": True}
FALCON_7B = FALCON | {"multi_query": True, "new_decoder_architecture": False}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_11B = FALCON_40B | {"activation": "gelu", "ffn_hidden_size": 96, "max_position_embeddings": 128}
FALCON_11B |= {"multi_query": True, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0, "tie_word_embeddings": False}

GEMMA = DECODER | {"attention_bias": False, "attention_dropout": 0.0, "head_dim": 16, "pad_token_id": 0}
GEMMA |= {"bos_token_id": 2, "eos_token_id": 1, "rms_norm_eps": 1e-2, "rope_theta": 10000.0}
del GEMMA["tie_word_embeddings"]  # the families' default is true, and no file says so
GEMMA1 = {"model_type": "gemma", **GEMMA, "num_key_value_heads": 1, "rope_scaling": None}
GEMMA1 |= {"hidden_act": "gelu", "hidden_activation": None}  # means gelu_pytorch_tanh all the same
GEMMA2 = {"model_type": "gemma2", **GEMMA, "num_hidden_layers": 4, "cache_implementation": "hybrid"}
GEMMA2 |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 12}
GEMMA2 |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 24}
GEMMA3 = {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 4, "cache_implementation": "hybrid"}
GEMMA3 |= {"eos_token_id": [1, 94], "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24}
GEMMA3 |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1000000.0}
GEMMA3 |= {"rope_local_base_freq": 10000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
GEMMA3 |= {"sliding_window": 12, "sliding_window_pattern": 3}
del GEMMA3["hidden_act"]
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3_TYPES = GEMMA3 | {"layer_types": [SLIDING, FULL, FULL, SLIDING]}
del GEMMA3_TYPES["sliding_window_pattern"]

PHI3 = {"model_type": "phi3", **DECODER, "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0}
PHI3 |= {"resid_pdrop": 0.0, "original_max_position_embeddings": 128, "pad_token_id": 0, "rope_scaling": None}
PHI3 |= {"rope_theta": 10000.0, "sliding_window": 12}
PHI3_LONG = PHI3 | {"max_position_embeddings": 96, "original_max_position_embeddings": 24, "sliding_window": 4096}
PHI3_LONG["rope_scaling"] = {key: LONGROPE[key] for key in ("long_factor", "short_factor")} | {"type": "longrope"}
PHI4 = PHI3 | {"hidden_size": 64, "partial_rotary_factor": 0.75, "sliding_window": 4096, "tie_word_embeddings": True}
PHI4_SCALING = {"long_factor": [1.2, 1.5, 2.0, 2.5, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 2.0]}
PHI4_LONG = PHI4 | {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
PHI4_LONG |= {"rope_scaling": PHI4_SCALING | {"type": "longrope"}}

GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
GPT2 |= {"activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
GPT2 |= {"bos_token_id": 95, "eos_token_id": 95, "initializer_range": 0.02, "layer_norm_epsilon": 1e-3}

# A case's place is its seed: add new ones at the end of hybrid_cases.py.
TINY_CASES = LLAMA_CASES | {
    "mistral_window": TinyCase(
        "MistralForCausalLM", MISTRAL | {"sliding_window": 12}, matters=({"sliding_window": None},)
    ),
    "mistral_full": TinyCase(
        "MistralForCausalLM",
        MISTRAL | {"head_dim": 16, "sliding_window": None},
        layout="transformers 5",
        matters=({"sliding_window": 12},),
    ),
    "yi_gqa": TinyCase("LlamaForCausalLM", YI, matters=({"rope_theta": 10000.0},)),
    "internlm_bias": TinyCase(
        "InternLMForCausalLM",
        INTERNLM,
        dtype=torch.float16,
        computed_as=INTERNLM | {"model_type": "llama", "attention_bias": True},
    ),
    "internlm2_gqa": TinyCase(
        "InternLM2ForCausalLM",
        INTERNLM2,
        matters=({"rope_theta": 10000.0},),
        computed_as=INTERNLM2 | {"model_type": "llama", "attention_bias": False},
        to_hub=fuse_internlm2,
    ),
    "qwen2_bias": TinyCase(
        "Qwen2ForCausalLM", QWEN2 | {"tie_word_embeddings": True}, matters=({"use_sliding_window": True},)
    ),
    "qwen2_window": TinyCase(
        "Qwen2ForCausalLM",
        QWEN2 | {"num_hidden_layers": 3, "use_sliding_window": True},
        matters=({"max_window_layers": 0}, {"max_window_layers": 2}, {"use_sliding_window": False}),
    ),
    "qwen3_qknorm": TinyCase("Qwen3ForCausalLM", QWEN3 | {"tie_word_embeddings": True}),
    "qwen3_moe": TinyCase(
        "Qwen3MoeForCausalLM", QWEN3_MOE, matters=({"norm_topk_prob": False}, {"num_experts_per_tok": 3})
    ),
    "qwen3_moe_mixed": TinyCase(  # dense, dense, dense, sparse
        "Qwen3MoeForCausalLM",
        QWEN3_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False},
        layout="transformers 5",
        matters=({"norm_topk_prob": True},),
    ),
    "mixtral_top2": TinyCase("MixtralForCausalLM", MIXTRAL, matters=({"num_experts_per_tok": 1},)),
    "falcon_7b": TinyCase("FalconForCausalLM", FALCON_7B),
    "falcon_40b": TinyCase("FalconForCausalLM", FALCON_40B, to_hub=add_lm_head),
    "falcon_11b": TinyCase("FalconForCausalLM", FALCON_11B, matters=({"rope_theta": 10000.0},)),
    "falcon_bias": TinyCase("FalconForCausalLM", FALCON_7B | {"bias": True}, layout="transformers 5"),
    "gemma_mqa": TinyCase("GemmaForCausalLM", GEMMA1, matters=({"hidden_act": "gelu_python"},)),
    "gemma2_softcap": TinyCase(
        "Gemma2ForCausalLM",
        GEMMA2,
        matters=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 16},
            {"layer_types": [FULL, SLIDING] * 2},
        ),
    ),
    "gemma3_local": TinyCase(
        "Gemma3ForCausalLM",
        GEMMA3,
        matters=(
            {"query_pre_attn_scalar": 16},
            {"rope_local_base_freq": 1000000.0},
            {"rope_scaling": None},
            {"rope_theta": 10000.0},
            {"sliding_window": 4096},
            {"sliding_window_pattern": 4},
        ),
    ),
    "gemma3_layer_types": TinyCase(
        "Gemma3ForCausalLM", GEMMA3_TYPES, layout="transformers 5", matters=({"layer_types": [FULL] * 4},)
    ),
    "phi3_fused": TinyCase("Phi3ForCausalLM", PHI3, matters=({"sliding_window": None},)),
    "phi3_longrope": TinyCase(
        "Phi3ForCausalLM",
        PHI3_LONG,
        matters=({"rope_scaling": None}, {"original_max_position_embeddings": 64}, {"max_position_embeddings": 48}),
    ),
    "phi4_partial": TinyCase("Phi3ForCausalLM", PHI4, matters=({"partial_rotary_factor": 1.0},)),
    "phi4_longrope": TinyCase(
        "Phi3ForCausalLM",
        PHI4_LONG,
        layout="transformers 5",
        matters=({"rope_scaling": None}, {"original_max_position_embeddings": 24}),
    ),
    "gpt2_learned": TinyCase("GPT2LMHeadModel", GPT2 | {"n_inner": 96}, layout="transformers 5"),
    "gpt2_hub": TinyCase("GPT2LMHeadModel", GPT2, dtype=torch.float32, to_hub=strip_gpt2),
}
