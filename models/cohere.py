"""Cohere's Command R7B and A: attention and MLP side by side, layer norms without biases; only windows are rotated."""

from __future__ import annotations

from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig, all_but_every
from jaxserve.models.parallel import ParallelDecoder


def read(raw: RawConfig) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    head_dim = raw.size("hidden_size") // raw.count("num_attention_heads")
    windows = raw.windows(layers, all_but_every(raw.integer("sliding_window_pattern"), layers)) or (None,) * layers
    return llama.read(
        raw,
        head_dim=head_dim,
        norm="layer_no_bias",
        norm_eps=raw.number("layer_norm_eps"),
        rope=raw.rope(head_dim, interleaved=True),
        windows=windows,
        unrotated_layers=tuple(layer for layer, window in enumerate(windows) if window is None),
        num_parallel_norms=1,
        logits_scale=raw.number("logit_scale"),
    )


COHERE2 = Family(
    models="Command R7B, Command A",
    model=ParallelDecoder,
    read=read,
    weights=partial(llama.weights, norms={"attention_norm": "input_layernorm"}),
    defaults={
        "hidden_act": "silu", "layer_norm_eps": 1e-5, "max_position_embeddings": 8192, "sliding_window": 4096,
        "sliding_window_pattern": 4, "logit_scale": 0.0625, "tie_word_embeddings": True,
    },
)  # fmt: skip
