"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule to each of gated attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models import llama
from jaxserve.models.config import ModelConfig, Recurrent
from jaxserve.models.delta_net import delta_net_weights
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.hybrid import HybridDecoder
from jaxserve.models.reshape import norm_weights, query_gate, separate_qkv, split_heads
from jaxserve.models.weights import Weight, whole

DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 32768, "num_attention_heads": 16, "head_dim": 256, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "full_attention_interval": 4, "partial_rotary_factor": 0.25,
}  # fmt: skip
LAYER_TYPES = ("linear_attention", "full_attention")


def _delta_layers(raw: RawConfig) -> tuple[int, ...]:
    count, interval = raw.count("num_hidden_layers"), raw.integer("full_attention_interval")
    types = raw.texts("layer_types") or [LAYER_TYPES[(i + 1) % interval == 0] for i in range(count)]
    if len(types) != count or not set(types) <= set(LAYER_TYPES):
        raise raw.error("layer_types", f"{count} of {' and '.join(LAYER_TYPES)}")
    if "full_attention" not in types:
        raise ModelError(f"{raw.where}: {raw.prefix}layer_types without full_attention are not supported")
    return tuple(i for i, kind in enumerate(types) if kind == "linear_attention")


def read(raw: RawConfig, **differences: Any) -> ModelConfig:
    """A config.json of either."""
    net = Recurrent(
        kind="delta_net",
        num_key_heads=raw.count("linear_num_key_heads"),
        num_value_heads=raw.count("linear_num_value_heads"),
        key_dim=raw.size("linear_key_head_dim"),
        value_dim=raw.size("linear_value_head_dim"),
        conv_width=raw.integer("linear_conv_kernel_dim", low=2, high=64),
        layers=_delta_layers(raw),
    )
    return llama.read(raw, qk_norm="head", norm="rms_plus_one", attention_gate=True, recurrent=net, **differences)


def _attention_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    theirs += ".self_attn"
    return {
        f"{ours}.qkv": separate_qkv(config, theirs),
        f"{ours}.gate": query_gate(config, f"{theirs}.q_proj.weight"),
        f"{ours}.out": whole(f"{theirs}.o_proj.weight", partial(split_heads, config)),
        **norm_weights(config, f"{ours}.q_norm", f"{theirs}.q_norm"),
        **norm_weights(config, f"{ours}.k_norm", f"{theirs}.k_norm"),
    }


def _attention_or_delta(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    if config.recurrent is None or not config.is_recurrent(layer):
        return _attention_weights(config, ours, theirs)
    return delta_net_weights(config.recurrent, ours, theirs)


QWEN3_5 = Family(
    models="Qwen3.5",
    read=read,
    weights=partial(llama.weights, attention=_attention_or_delta),
    model=HybridDecoder,
    defaults=DEFAULTS | {"num_key_value_heads": 4},
)
