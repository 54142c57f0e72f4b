"""Mixtral: Llama with a mixture of experts in every layer."""

from __future__ import annotations

from jaxserve.models import llama
from jaxserve.models.config import Experts, ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.layers import norm_weights
from jaxserve.models.moe import moe_weights
from jaxserve.models.weights import Weight


def read(raw: RawConfig) -> ModelConfig:
    layers = raw.number("num_hidden_layers")
    experts = Experts(
        count=raw.number("num_local_experts"),
        per_token=raw.number("num_experts_per_tok"),
        intermediate_size=raw.number("intermediate_size"),
        normalise=True,
        layers=tuple(range(layers)),
    )
    return llama.read(raw, windows=raw.windows(layers, ["sliding_attention"] * layers), experts=experts)


def weights(config: ModelConfig) -> dict[str, Weight]:
    assert config.experts is not None
    found = llama.outer_weights(config)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        moe = f"{theirs}.block_sparse_moe"
        found |= norm_weights(config, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        found |= norm_weights(config, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        found |= llama.attention_weights(config, f"{ours}.attention", f"{theirs}.self_attn")
        names = ("w1", "w3", "w2")
        found |= moe_weights(f"{ours}.mlp", f"{moe}.gate.weight", f"{moe}.experts.{{}}", *names, config.experts.count)
    return found


_DEFAULTS = llama.MISTRAL_DEFAULTS | {
    "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL = Family(models="Mixtral", read=read, weights=weights, defaults=_DEFAULTS)
