"""Granite: Llama with a factor for embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from typing import Any

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig


def read(raw: RawConfig, **differences: Any) -> ModelConfig:
    """A config.json with Granite's factors; ``differences`` are fields of ModelConfig that a family has otherwise."""
    return llama.read(
        raw,
        embedding_scale=raw.number("embedding_multiplier"),
        attention_scale=raw.number("attention_multiplier"),
        residual_scale=raw.number("residual_multiplier"),
        logits_scale=1 / raw.number("logits_scaling"),
        **differences,
    )


_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
DEFAULTS = llama.DEFAULTS | dict.fromkeys(_MULTIPLIERS, 1.0)
GRANITE = Family(models="Granite 3", read=read, weights=llama.weights, defaults=DEFAULTS)
