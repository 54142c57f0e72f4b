"""Mixtral: Llama with a mixture of experts in every layer."""

from __future__ import annotations

from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import Experts, ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.moe import moe_weights
from jaxserve.models.weights import Weight


def read(raw: RawConfig) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    experts = Experts(
        count=raw.count("num_local_experts"),
        per_token=raw.count("num_experts_per_tok"),
        intermediate_size=raw.size("intermediate_size"),
        normalise=True,
        layers=tuple(range(layers)),
    )
    return llama.read(raw, windows=raw.windows(layers, ["sliding_attention"] * layers), experts=experts)


def _mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    assert config.experts is not None
    moe = f"{theirs}.block_sparse_moe"
    return moe_weights(ours, f"{moe}.gate.weight", f"{moe}.experts.{{}}", "w1", "w3", "w2", config.experts.count)


_DEFAULTS = llama.MISTRAL_DEFAULTS | {
    "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL = Family(models="Mixtral", read=read, weights=partial(llama.weights, mlp=_mlp_weights), defaults=_DEFAULTS)
