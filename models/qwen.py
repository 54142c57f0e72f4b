"""Qwen: Llama with biases on query, key and value (2), with norms on query and key (3), and with experts (MoE)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from jaxserve.models import llama
from jaxserve.models.config import Experts, ModelConfig, SharedExpert
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.moe import moe_weights
from jaxserve.models.weights import Weight, whole


def _windows(raw: RawConfig) -> tuple[int | None, ...]:
    """The layers from ``max_window_layers`` on have a window, where ``use_sliding_window`` says so."""
    if not raw.flag("use_sliding_window"):
        return ()
    layers, first = raw.count("num_hidden_layers"), raw.integer("max_window_layers", low=0)
    return raw.windows(layers, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


def read_qwen2(raw: RawConfig) -> ModelConfig:
    return llama.read(raw, qkv_bias=True, out_bias=False, windows=_windows(raw))


def read_qwen3(raw: RawConfig) -> ModelConfig:
    return llama.read(raw, qk_norm="head", windows=_windows(raw))


def _sparse_layers(raw: RawConfig) -> tuple[int, ...]:
    """Those that have experts."""
    step, dense = raw.integer("decoder_sparse_step"), raw.integers("mlp_only_layers") or ()
    return tuple(i for i in range(raw.count("num_hidden_layers")) if i not in dense and (i + 1) % step == 0)


def read_experts(raw: RawConfig, **differences: Any) -> Experts:
    return Experts(
        # transformers 5 writes the first name, the hub's files have the second.
        count=raw.count("num_local_experts" if raw.has("num_local_experts") else "num_experts"),
        per_token=raw.count("num_experts_per_tok"),
        intermediate_size=raw.size("moe_intermediate_size"),
        normalise=raw.flag("norm_topk_prob"),
        layers=_sparse_layers(raw),
        **differences,
    )


def read_qwen2_moe(raw: RawConfig) -> ModelConfig:
    layers, first_full = raw.count("num_hidden_layers"), raw.integer("max_window_layers", low=0)
    types = ["full_attention" if i % 2 or i >= first_full else "sliding_attention" for i in range(layers)]
    shared = SharedExpert(intermediate_size=raw.size("shared_expert_intermediate_size"), gated=True)
    return llama.read(
        raw,
        qkv_bias=raw.flag("qkv_bias"),
        out_bias=False,
        windows=raw.windows(layers, types) if raw.flag("use_sliding_window") else (),
        experts=read_experts(raw, shared=shared),
    )


def read_qwen3_moe(raw: RawConfig) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    everywhere = raw.windows(layers, ["sliding_attention"] * layers) if raw.flag("use_sliding_window") else ()
    return llama.read(raw, qk_norm="head", windows=everywhere, experts=read_experts(raw))


def moe_or_mlp_weights(
    config: ModelConfig, layer: int, ours: str, theirs: str, *, shared: str = "shared_expert"
) -> dict[str, Weight]:
    """Of a layer that has a mixture with Qwen's names, or none; ``shared`` is that of the expert of all tokens."""

    def only_row(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(-1)

    experts = config.experts
    assert experts is not None
    if layer not in experts.layers:
        return llama.mlp_weights(config, layer, ours, theirs)
    theirs += ".mlp"
    names = ("gate_proj", "up_proj", "down_proj")
    found = moe_weights(ours, f"{theirs}.gate.weight", f"{theirs}.experts.{{}}", *names, experts.count)
    if experts.choice_bias:
        found[f"{ours}.choice_bias"] = whole(f"{theirs}.gate.e_score_correction_bias")
    if experts.shared is not None:
        found |= llama.gated_mlp_weights(config, f"{ours}.shared.mlp", f"{theirs}.{shared}")
        if experts.shared.gated:
            found[f"{ours}.shared.gate"] = whole(f"{theirs}.{shared}_gate.weight", only_row)
    return found


_WINDOW = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN2 = llama.DEFAULTS | _WINDOW | {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN2_MOE = _QWEN2 | {
    "num_key_value_heads": 16, "decoder_sparse_step": 1, "num_experts": 60, "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "qkv_bias": True,
}  # fmt: skip
_QWEN3_MOE = _QWEN2 | {
    "num_key_value_heads": 4, "decoder_sparse_step": 1, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}  # fmt: skip
_MOE_WEIGHTS = partial(llama.weights, mlp=moe_or_mlp_weights)

QWEN2 = Family(models="Qwen 2, 2.5", read=read_qwen2, weights=llama.weights, defaults=_QWEN2)
QWEN2_MOE = Family(models="Qwen 1.5, 2 MoE", read=read_qwen2_moe, weights=_MOE_WEIGHTS, defaults=_QWEN2_MOE)
QWEN3 = Family(models="Qwen 3", read=read_qwen3, weights=llama.weights, defaults=_QWEN2 | {"head_dim": 128})
QWEN3_MOE = Family(models="Qwen 3 MoE", read=read_qwen3_moe, weights=_MOE_WEIGHTS, defaults=_QWEN3_MOE)
