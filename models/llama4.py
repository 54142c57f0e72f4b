"""The text of Llama 4: experts beside one for all tokens; layers that rotate, and layers whose queries grow instead."""

from __future__ import annotations

from functools import partial

import numpy as np

from jaxserve.models import llama
from jaxserve.models.config import Experts, ModelConfig, SharedExpert, Temperature
from jaxserve.models.family import Family, language_model_name
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.weights import Weight, whole


def read(raw: RawConfig) -> ModelConfig:
    layers, unrotated = raw.count("num_hidden_layers"), raw.unrotated_layers(raw.count("num_hidden_layers"))
    head_dim = raw.head_dim(raw.size("hidden_size") // raw.count("num_attention_heads"))
    return llama.read(
        raw,
        intermediate_size=raw.size("intermediate_size_mlp"),
        chunk_tokens=raw.optional_integer("attention_chunk_size"),
        qk_norm="unweighted" if raw.flag("use_qk_norm") else None,
        rope=raw.rope(head_dim, interleaved=True),
        unrotated_layers=unrotated,
        temperature=_temperature(raw, unrotated) if raw.flag("attn_temperature_tuning") else None,
        experts=_experts(raw, layers),
    )


def _temperature(raw: RawConfig, layers: tuple[int, ...]) -> Temperature:
    return Temperature(
        strength=raw.number("attn_scale"), step_tokens=raw.integer("floor_scale"), offset=1, layers=layers
    )


def _experts(raw: RawConfig, layers: int) -> Experts:
    step, inner = raw.integer("interleave_moe_layer_step"), raw.size("intermediate_size")
    listed = raw.integers("moe_layers")
    return Experts(
        count=raw.count("num_local_experts"),
        per_token=raw.count("num_experts_per_tok"),
        intermediate_size=inner,
        normalise=False,
        layers=tuple(range(step - 1, layers, step) if listed is None else listed),
        router="sigmoid",
        weighs_inputs=True,
        shared=SharedExpert(intermediate_size=inner, gated=False),
    )


def _mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    experts = config.experts
    assert experts is not None
    theirs += ".feed_forward"
    if layer not in experts.layers:
        return llama.gated_mlp_weights(config, ours, theirs)

    def halves(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(experts.count, config.hidden_size, 2, -1).transpose(2, 0, 1, 3)

    return {
        f"{ours}.router": whole(f"{theirs}.router.weight"),
        f"{ours}.gate_up": whole(f"{theirs}.experts.gate_up_proj", halves),
        f"{ours}.down": whole(f"{theirs}.experts.down_proj"),
        **llama.gated_mlp_weights(config, f"{ours}.shared.mlp", f"{theirs}.shared_expert"),
    }


_WEIGHTS = partial(llama.weights, mlp=_mlp_weights)
_DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_local_experts": 16,
    "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "use_qk_norm": True, "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
}  # fmt: skip

LLAMA4 = Family(models="Llama 4", read=read, weights=_WEIGHTS, defaults=_DEFAULTS)
LLAMA4_VISION = Family(
    models="Llama 4 that can see, on text alone",
    read=read,
    weights=_WEIGHTS,
    defaults=_DEFAULTS,
    nested="text_config",
    tensor_name=language_model_name,
)
