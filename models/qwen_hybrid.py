"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule to each of gated attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models import llama
from jaxserve.models.config import DeltaNet, ModelConfig
from jaxserve.models.delta_net import HybridDecoder, delta_net_weights, separate_rows
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.reshape import norm_weights, query_gate, separate_qkv, split_heads
from jaxserve.models.weights import Part, Weight, whole

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
    net = DeltaNet(
        num_key_heads=raw.count("linear_num_key_heads"),
        num_value_heads=raw.count("linear_num_value_heads"),
        key_dim=raw.size("linear_key_head_dim"),
        value_dim=raw.size("linear_value_head_dim"),
        conv_width=raw.integer("linear_conv_kernel_dim", low=2, high=64),
        layers=_delta_layers(raw),
    )
    return llama.read(raw, qk_norm=True, norm="rms_plus_one", attention_gate=True, delta_net=net, **differences)


def _attention_weights(config: ModelConfig, ours: str, theirs: str) -> dict[str, Weight]:
    theirs += ".self_attn"
    return {
        f"{ours}.qkv": separate_qkv(config, theirs),
        f"{ours}.gate": query_gate(config, f"{theirs}.q_proj.weight"),
        f"{ours}.out": whole(f"{theirs}.o_proj.weight", partial(split_heads, config)),
        **norm_weights(config, f"{ours}.q_norm", f"{theirs}.q_norm"),
        **norm_weights(config, f"{ours}.k_norm", f"{theirs}.k_norm"),
    }


def _separate(net: DeltaNet, theirs: str) -> tuple[Weight, Weight]:
    """Qwen3.5 has queries, keys and values one after the other, and all else in tensors of its own."""
    width = 2 * net.key_dim + net.values_per_key * net.value_dim

    def by_head(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(net.num_key_heads, -1, tensor.shape[-1])

    mixed = (
        *separate_rows(net, f"{theirs}.linear_attn.in_proj_qkv.weight"),
        Part(f"{theirs}.linear_attn.in_proj_z.weight", by_head, (0, width)),
    )
    rates = (
        Part(f"{theirs}.linear_attn.in_proj_b.weight", by_head),
        Part(f"{theirs}.linear_attn.in_proj_a.weight", by_head, (0, net.values_per_key)),
    )
    return mixed, rates


def _attention_or_delta(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    net = config.delta_net
    assert net is not None
    if not config.is_recurrent(layer):
        return _attention_weights(config, ours, theirs)
    return delta_net_weights(config, ours, theirs, *_separate(net, theirs))


QWEN3_5 = Family(
    models="Qwen3.5",
    read=read,
    weights=partial(llama.weights, attention=_attention_or_delta),
    model=HybridDecoder,
    defaults=DEFAULTS | {"num_key_value_heads": 4},
)
