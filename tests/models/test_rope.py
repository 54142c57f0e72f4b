"""Rotary embeddings: kinds and lengths. Their values are tested through whole models (test_families.py)."""

from __future__ import annotations

import pytest

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig, Rope
from jaxserve.models.rope import longest_sequence, rope_frequencies


def tiny_config(rope: Rope) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=4, max_position_embeddings=64, norm_eps=1e-5, rope=rope,
    )  # fmt: skip


def test_unknown_rope_kind_is_named() -> None:
    with pytest.raises(ModelError, match="'spiral' is not supported; supported: default, linear, dynamic"):
        rope_frequencies(Rope(theta=1e4, dim=4, kind="spiral"), trained=8, max_len=8)


@pytest.mark.parametrize(
    ("kind", "options", "tokens"),
    [
        ("linear", {"factor": 4.0}, 256),
        ("dynamic", {"factor": 2.0}, 128),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ("yarn", {"original_max_position_embeddings": 16}, 64),
        ("llama3", {"factor": 8.0}, 64),
        ("longrope", {}, 64),
    ],
)
def test_longest_sequence(kind: str, options: dict, tokens: int) -> None:
    assert longest_sequence(tiny_config(Rope(theta=1e4, dim=4))) == 64
    assert longest_sequence(tiny_config(Rope(theta=1e4, dim=4, kind=kind, options=options))) == tokens
