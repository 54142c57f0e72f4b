"""Mixtral: Llama with a mixture of experts in every layer. Phi-3.5-MoE: with layer norms and another router."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxserve.models import llama
from jaxserve.models.config import Experts, ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.moe import moe_weights
from jaxserve.models.weights import Weight


def read(raw: RawConfig, **differences: Any) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    windows = raw.windows(layers, ["sliding_attention"] * layers)
    return llama.read(raw, **{"windows": windows, "experts": _experts(raw)} | differences)


def read_phimoe(raw: RawConfig) -> ModelConfig:
    experts = _experts(raw, normalise=False, router="sparse_mixer", jitter=raw.number("router_jitter_noise", zero=True))
    return read(raw, norm="layer", head_bias=raw.flag("lm_head_bias"), experts=experts)


def _experts(raw: RawConfig, **differences: Any) -> Experts:
    fields: dict[str, Any] = {
        "count": raw.count("num_local_experts"),
        "per_token": raw.count("num_experts_per_tok"),
        "intermediate_size": raw.size("intermediate_size"),
        "normalise": True,
        "layers": tuple(range(raw.count("num_hidden_layers"))),
    }
    return Experts(**fields | differences)


def _mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    assert config.experts is not None
    moe = f"{theirs}.block_sparse_moe"
    return moe_weights(ours, f"{moe}.gate.weight", f"{moe}.experts.{{}}", "w1", "w3", "w2", config.experts.count)


_MIXTRAL = llama.MISTRAL_DEFAULTS | {
    "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
_PHIMOE = _MIXTRAL | {"num_local_experts": 16, "router_jitter_noise": 0.01}
_WEIGHTS = partial(llama.weights, mlp=_mlp_weights)

MIXTRAL = Family(models="Mixtral", read=read, weights=_WEIGHTS, defaults=_MIXTRAL)
PHIMOE = Family(models="Phi-3.5-MoE", read=read_phimoe, weights=_WEIGHTS, defaults=_PHIMOE)
