"""Granite: Llama with a factor for embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig


def read(raw: RawConfig) -> ModelConfig:
    return llama.read(
        raw,
        embedding_scale=raw.number("embedding_multiplier"),
        attention_scale=raw.number("attention_multiplier"),
        residual_scale=raw.number("residual_multiplier"),
        logits_scale=1 / raw.number("logits_scaling"),
    )


_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
GRANITE = Family(
    models="Granite 3", read=read, weights=llama.weights, defaults=llama.DEFAULTS | dict.fromkeys(_MULTIPLIERS, 1.0)
)
