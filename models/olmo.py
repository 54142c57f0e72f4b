"""Norms behind attention and MLP, and norms of queries and keys: OLMo 2 and 3, EXAONE 4."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig, all_but_every


def read_olmo2(raw: RawConfig, **differences: Any) -> ModelConfig:
    return llama.read(raw, norm_places="after", qk_norm="all_heads", **differences)


def read_olmo3(raw: RawConfig) -> ModelConfig:
    """Layers with a window rotate plainly."""
    layers = raw.count("num_hidden_layers")
    head_dim = raw.head_dim(raw.size("hidden_size") // raw.count("num_attention_heads"))
    rope = raw.rope(head_dim, layers="full_attention")
    return read_olmo2(
        raw,
        windows=raw.windows(layers, all_but_every(4, layers)),
        rope=rope,
        local_rope=raw.local_rope(head_dim, rope.theta),
    )


def read_exaone4(raw: RawConfig) -> ModelConfig:
    """Where some layers have a window, the others do not rotate."""
    layers = raw.count("num_hidden_layers")
    windows: tuple[int | None, ...] = ()
    if raw.has("sliding_window"):
        types = ["full_attention"] * layers
        if not raw.has("layer_types"):  # a file that has them may write the pattern in letters
            types = all_but_every(raw.integer("sliding_window_pattern"), layers)
        windows = raw.windows(layers, types) or (None,) * layers
    unrotated = tuple(layer for layer, window in enumerate(windows) if window is None)
    return llama.read(raw, norm_places="after", qk_norm="head", windows=windows, unrotated_layers=unrotated)


_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_WEIGHTS = partial(llama.weights, norms=_NORMS)
_OLMO2 = llama.DEFAULTS | {"rms_norm_eps": 1e-5}
_OLMO3 = _OLMO2 | {"rope_theta": 5e5, "sliding_window": 4096}
_EXAONE4 = _OLMO2 | {"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4}

OLMO2 = Family(models="OLMo 2", read=read_olmo2, weights=_WEIGHTS, defaults=_OLMO2)
OLMO3 = Family(models="OLMo 3", read=read_olmo3, weights=_WEIGHTS, defaults=_OLMO3)
EXAONE4 = Family(models="EXAONE 4", read=read_exaone4, weights=_WEIGHTS, defaults=_EXAONE4)
