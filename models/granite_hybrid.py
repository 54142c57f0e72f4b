"""Granite 4: Mamba-2's layers with a few of attention among them, Granite's factors, and perhaps experts."""

from __future__ import annotations

import math

from jaxserve.models import granite, llama
from jaxserve.models.config import Experts, ModelConfig, Recurrent, SharedExpert
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.hybrid import HybridDecoder
from jaxserve.models.mamba import mamba2_weights
from jaxserve.models.weights import Weight, whole

RECURRENT, ATTENTION = ("mamba", "linear_attention"), ("attention", "full_attention")
"""Names of either kind of layer, the hub's files' and transformers'."""


def _states(raw: RawConfig) -> Recurrent:
    types = raw.texts("layer_types") or []
    if len(types) != raw.count("num_hidden_layers") or not set(types) <= {*RECURRENT, *ATTENTION}:
        raise raw.error("layer_types", f"{raw.count('num_hidden_layers')} of {' and '.join((*RECURRENT, *ATTENTION))}")
    if not set(types) & set(ATTENTION):
        raise raw.error("layer_types", f"with {ATTENTION[0]} among them")
    if raw.has("time_step_limit") and list(raw.values["time_step_limit"]) != [0, math.inf]:
        raise raw.error("time_step_limit", "[0, Infinity]")
    raw.require("mamba_proj_bias", False)
    heads, inner = raw.count("mamba_n_heads"), raw.integer("mamba_expand") * raw.size("hidden_size")
    head_dim = inner // heads if raw.values["mamba_d_head"] == "auto" else raw.size("mamba_d_head")
    if head_dim * heads != inner:
        raise raw.error("mamba_d_head", f"{inner} / mamba_n_heads {heads}")
    return Recurrent(
        kind="mamba2",
        num_key_heads=raw.count("mamba_n_groups"),
        num_value_heads=heads,
        key_dim=raw.size("mamba_d_state"),
        value_dim=head_dim,
        conv_width=raw.integer("mamba_d_conv", low=2, high=64),
        layers=tuple(i for i, kind in enumerate(types) if kind in RECURRENT),
        conv_bias=raw.flag("mamba_conv_bias"),
    )


def read(raw: RawConfig) -> ModelConfig:
    """A config.json of either kind, with experts or without."""
    layers, shared = tuple(range(raw.count("num_hidden_layers"))), raw.size("shared_intermediate_size")
    if not raw.integer("num_local_experts", low=0):
        raw.values["intermediate_size"] = shared
        experts = None
    else:
        experts = Experts(
            count=raw.count("num_local_experts"),
            per_token=raw.count("num_experts_per_tok"),
            intermediate_size=raw.size("intermediate_size"),
            normalise=True,
            layers=layers,
            shared=SharedExpert(intermediate_size=shared, gated=False),
        )
    rotates = raw.text("position_embedding_type") == "rope"
    return granite.read(raw, recurrent=_states(raw), experts=experts, unrotated_layers=() if rotates else layers)


def _mixer_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    if config.recurrent is None or not config.is_recurrent(layer):
        return llama.attention_weights(config, layer, ours, theirs)
    return mamba2_weights(config.recurrent, ours, theirs)


def _mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    shared = ours if config.experts is None else f"{ours}.shared.mlp"
    found = {
        f"{shared}.gate_up": whole(f"{theirs}.shared_mlp.input_linear.weight", lambda x: x.reshape(2, -1, x.shape[-1])),
        f"{shared}.down": whole(f"{theirs}.shared_mlp.output_linear.weight"),
    }
    if config.experts is not None:
        count, theirs = config.experts.count, f"{theirs}.block_sparse_moe"
        found |= {
            f"{ours}.router": whole(f"{theirs}.router.layer.weight"),
            f"{ours}.gate_up": whole(
                f"{theirs}.input_linear.weight",
                lambda x: x.reshape(count, 2, -1, x.shape[-1]).transpose(1, 0, 3, 2),
            ),
            f"{ours}.down": whole(f"{theirs}.output_linear.weight", lambda x: x.transpose(0, 2, 1)),
        }
    return found


def weights(config: ModelConfig) -> dict[str, Weight]:
    """Every parameter's."""
    return llama.weights(config, attention=_mixer_weights, mlp=_mlp_weights)


DEFAULTS = granite.DEFAULTS | {
    "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": "auto", "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_conv_bias": True, "num_local_experts": 8, "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
}  # fmt: skip
GRANITE_HYBRID = Family(models="Granite 4", read=read, weights=weights, model=HybridDecoder, defaults=DEFAULTS)
