"""Seed-OSS: Llama with biases on query, key and value."""

from __future__ import annotations

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig


def read(raw: RawConfig) -> ModelConfig:
    return llama.read(raw, out_bias=raw.flag("attention_out_bias"))


SEED_OSS = Family(
    models="Seed-OSS",
    read=read,
    weights=llama.weights,
    defaults=llama.DEFAULTS
    | {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True},
)
