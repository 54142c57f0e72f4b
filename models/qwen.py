"""Qwen: Llama with biases on query, key and value (2), with norms on query and key (3), and with experts (3-MoE)."""

from __future__ import annotations

from functools import partial

from jaxserve.models import llama
from jaxserve.models.config import Experts, ModelConfig
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.moe import moe_weights
from jaxserve.models.weights import Weight


def _windows(raw: RawConfig) -> tuple[int | None, ...]:
    """The layers from ``max_window_layers`` on have a window, where ``use_sliding_window`` says so."""
    if not raw.flag("use_sliding_window"):
        return ()
    layers, first = raw.count("num_hidden_layers"), raw.integer("max_window_layers", low=0)
    return raw.windows(layers, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


def read_qwen2(raw: RawConfig) -> ModelConfig:
    return llama.read(raw, qkv_bias=True, out_bias=False, windows=_windows(raw))


def read_qwen3(raw: RawConfig) -> ModelConfig:
    return llama.read(raw, qk_norm=True, windows=_windows(raw))


def read_qwen3_moe(raw: RawConfig) -> ModelConfig:
    layers, step = raw.count("num_hidden_layers"), raw.integer("decoder_sparse_step")
    dense = raw.integers("mlp_only_layers") or ()
    experts = Experts(
        # transformers 5 writes the first name, the hub's files have the second.
        count=raw.count("num_local_experts" if raw.has("num_local_experts") else "num_experts"),
        per_token=raw.count("num_experts_per_tok"),
        intermediate_size=raw.size("moe_intermediate_size"),
        normalise=raw.flag("norm_topk_prob"),
        layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
    )
    everywhere = raw.windows(layers, ["sliding_attention"] * layers) if raw.flag("use_sliding_window") else ()
    return llama.read(raw, qk_norm=True, windows=everywhere, experts=experts)


def _moe_or_mlp_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    assert config.experts is not None
    if layer not in config.experts.layers:
        return llama.mlp_weights(config, layer, ours, theirs)
    names = ("gate_proj", "up_proj", "down_proj")
    return moe_weights(ours, f"{theirs}.mlp.gate.weight", f"{theirs}.mlp.experts.{{}}", *names, config.experts.count)


_WINDOW = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN2 = llama.DEFAULTS | _WINDOW | {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN3_MOE = _QWEN2 | {
    "num_key_value_heads": 4, "decoder_sparse_step": 1, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}  # fmt: skip

QWEN2 = Family(models="Qwen 2, 2.5", read=read_qwen2, weights=llama.weights, defaults=_QWEN2)
QWEN3 = Family(models="Qwen 3", read=read_qwen3, weights=llama.weights, defaults=_QWEN2 | {"head_dim": 128})
QWEN3_MOE = Family(
    models="Qwen 3 MoE",
    read=read_qwen3_moe,
    weights=partial(llama.weights, mlp=_moe_or_mlp_weights),
    defaults=_QWEN3_MOE,
)
