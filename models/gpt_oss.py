"""gpt-oss: heads with sinks, windows in every other layer, experts with biases and a gate that is clamped."""

from __future__ import annotations

from functools import partial

import numpy as np

from jaxserve.models import llama
from jaxserve.models.config import ClampedSwiGLU, Experts, ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig, all_but_every
from jaxserve.models.weights import Weight, whole


def read(raw: RawConfig) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    experts = Experts(
        count=raw.count("num_local_experts"),
        per_token=raw.count("num_experts_per_tok"),
        intermediate_size=raw.size("intermediate_size"),
        normalise=True,
        layers=tuple(range(layers)),
        bias=True,
        gate=ClampedSwiGLU(alpha=raw.number("swiglu_alpha"), limit=raw.number("swiglu_limit")),
    )
    return llama.read(raw, windows=raw.windows(layers, all_but_every(2, layers)), attention_sinks=True, experts=experts)


def _mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    """Gate and up lie in turns."""

    def halves(tensor: np.ndarray) -> np.ndarray:
        return np.moveaxis(tensor.reshape(*tensor.shape[:-1], -1, 2), -1, 0)

    theirs += ".mlp"
    return {
        f"{ours}.router": whole(f"{theirs}.router.weight"),
        f"{ours}.router_bias": whole(f"{theirs}.router.bias"),
        f"{ours}.gate_up": whole(f"{theirs}.experts.gate_up_proj", halves),
        f"{ours}.gate_up_bias": whole(f"{theirs}.experts.gate_up_proj_bias", halves),
        f"{ours}.down": whole(f"{theirs}.experts.down_proj"),
        f"{ours}.down_bias": whole(f"{theirs}.experts.down_proj_bias"),
    }


_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
GPT_OSS = Family(
    models="gpt-oss, also with MXFP4 experts",
    read=read,
    weights=partial(llama.weights, mlp=_mlp_weights),
    defaults=llama.DEFAULTS
    | {
        "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "rope_theta": 150000.0, "rope_parameters": _YARN, "sliding_window": 128, "attention_bias": True,
        "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    },
)  # fmt: skip
