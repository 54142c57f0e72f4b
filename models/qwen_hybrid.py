"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule to each of gated attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models import llama
from jaxserve.models.config import ModelConfig, Recurrent, SharedExpert
from jaxserve.models.delta_net import delta_net_weights, fused_delta_net_weights
from jaxserve.models.family import Family, language_model_name
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.hybrid import HybridDecoder
from jaxserve.models.moe import separate_experts
from jaxserve.models.qwen import moe_or_mlp_weights, read_experts
from jaxserve.models.reshape import norm_weights, query_gate, separate_qkv, split_heads
from jaxserve.models.weights import Weight, whole

DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 32768, "num_attention_heads": 16, "head_dim": 256, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "full_attention_interval": 4, "partial_rotary_factor": 0.25,
}  # fmt: skip
LAYER_TYPES = ("linear_attention", "full_attention")


def _delta_layers(raw: RawConfig) -> tuple[int, ...]:
    count, interval = raw.count("num_hidden_layers"), raw.integer("full_attention_interval")
    types = raw.texts("layer_types") or [LAYER_TYPES[(i + 1) % interval == 0] for i in range(count)]
    if len(types) != count or not set(types) <= set(LAYER_TYPES):
        raise raw.error("layer_types", f"{count} of {' and '.join(LAYER_TYPES)}")
    if "full_attention" not in types:
        raise ModelError(f"{raw.where}: {raw.prefix}layer_types without full_attention are not supported")
    return tuple(i for i, kind in enumerate(types) if kind == "linear_attention")


def read(raw: RawConfig, **differences: Any) -> ModelConfig:
    """A config.json of either."""
    net = Recurrent(
        kind="delta_net",
        num_key_heads=raw.count("linear_num_key_heads"),
        num_value_heads=raw.count("linear_num_value_heads"),
        key_dim=raw.size("linear_key_head_dim"),
        value_dim=raw.size("linear_value_head_dim"),
        conv_width=raw.integer("linear_conv_kernel_dim", low=2, high=64),
        layers=_delta_layers(raw),
    )
    return llama.read(raw, qk_norm="head", norm="rms_plus_one", attention_gate=True, recurrent=net, **differences)


def _attention_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    theirs += ".self_attn"
    return {
        f"{ours}.qkv": separate_qkv(config, theirs),
        f"{ours}.gate": query_gate(config, f"{theirs}.q_proj.weight"),
        f"{ours}.out": whole(f"{theirs}.o_proj.weight", partial(split_heads, config)),
        **norm_weights(config, f"{ours}.q_norm", f"{theirs}.q_norm"),
        **norm_weights(config, f"{ours}.k_norm", f"{theirs}.k_norm"),
    }


def read_next(raw: RawConfig) -> ModelConfig:
    """With experts, and one for all tokens."""
    shared = SharedExpert(intermediate_size=raw.size("shared_expert_intermediate_size"), gated=True)
    return read(raw, experts=read_experts(raw, shared=shared))


def _mixer_weights(
    of_delta_net: Callable[[Recurrent, str, str], dict[str, Weight]],
    config: ModelConfig,
    layer: int,
    ours: str,
    theirs: str,
) -> dict[str, Weight]:
    if config.recurrent is None or not config.is_recurrent(layer):
        return _attention_weights(config, ours, theirs)
    return of_delta_net(config.recurrent, ours, theirs)


def _tensor_name(name: str) -> str | None:
    """Neither what sees nor layers that guess further tokens."""
    return None if re.match(r"(model\.)?(visual|mtp)\.", name) else language_model_name(name)


_QWEN3_5 = DEFAULTS | {"num_key_value_heads": 4}
_QWEN3_NEXT = DEFAULTS | {
    "num_key_value_heads": 2, "decoder_sparse_step": 1, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
}  # fmt: skip
_WEIGHTS = partial(llama.weights, attention=partial(_mixer_weights, delta_net_weights))

QWEN3_5 = Family(
    models="Qwen3.5", read=read, weights=_WEIGHTS, model=HybridDecoder, defaults=_QWEN3_5, tensor_name=_tensor_name
)
QWEN3_5_VISION = replace(QWEN3_5, models="Qwen3.5 that can see, on text alone", nested="text_config")
_QWEN3_5_MOE = _QWEN3_NEXT | {
    "num_experts": 256, "num_experts_per_tok": 8,
    "intermediate_size": 512,  # which no layer has
}  # fmt: skip
_MOE_WEIGHTS = partial(llama.weights, attention=partial(_mixer_weights, delta_net_weights), mlp=moe_or_mlp_weights)
QWEN3_5_MOE = Family(
    models="Qwen3.5 with experts",
    read=read_next,
    weights=_MOE_WEIGHTS,
    model=HybridDecoder,
    defaults=_QWEN3_5_MOE,
    tensor_name=_tensor_name,
    divide=separate_experts,
)
QWEN3_5_MOE_VISION = replace(
    QWEN3_5_MOE, models="Qwen3.5 with experts that can see, on text alone", nested="text_config"
)
QWEN3_NEXT = Family(
    models="Qwen3-Next",
    read=read_next,
    weights=partial(llama.weights, attention=partial(_mixer_weights, fused_delta_net_weights), mlp=moe_or_mlp_weights),
    model=HybridDecoder,
    defaults=_QWEN3_NEXT,
    tensor_name=_tensor_name,
)
