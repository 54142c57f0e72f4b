"""SmolLM3: Llama with layers that do not rotate."""

from __future__ import annotations

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig


def read(raw: RawConfig) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    unrotated = raw.unrotated_layers(layers)
    types = ["sliding_attention" if i in unrotated else "full_attention" for i in range(layers)]
    windows = raw.windows(layers, types) if raw.flag("use_sliding_window") else ()
    return llama.read(raw, unrotated_layers=unrotated, windows=windows)


SMOLLM3 = Family(
    models="SmolLM3",
    read=read,
    weights=llama.weights,
    defaults=llama.DEFAULTS
    | {
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
)  # fmt: skip
