"""Ministral 3 and the text of Mistral 3: Mistral whose queries may grow with their position."""

from __future__ import annotations

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig, Temperature
from jaxserve.models.family import Family, language_model_name
from jaxserve.models.hf_config import RawConfig


def read(raw: RawConfig) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    windows = raw.windows(layers, ["sliding_attention"] * layers)
    return llama.read(raw, windows=windows, temperature=_temperature(raw, layers))


def _temperature(raw: RawConfig, layers: int) -> Temperature | None:
    options = raw.rope_fields()
    strength = options.optional_number("llama_4_scaling_beta")
    if strength is None:
        return None
    trained = options.optional_integer("original_max_position_embeddings") or raw.integer("max_position_embeddings")
    return Temperature(strength=strength, step_tokens=trained, offset=0, layers=tuple(range(layers)))


_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_MINISTRAL3 = llama.DEFAULTS | {
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5,
    "rope_parameters": _YARN,
}  # fmt: skip

MINISTRAL3 = Family(models="Ministral 3", read=read, weights=llama.weights, defaults=_MINISTRAL3)
MISTRAL3 = Family(
    models="Mistral Small 3.1, 3.2 and Ministral 3 that can see, on text alone",
    read=read,
    weights=llama.weights,
    defaults=llama.MISTRAL_DEFAULTS,
    nested="text_config",
    tensor_name=language_model_name,
)
