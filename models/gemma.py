"""Gemma: norms around 1, scaled embeddings, GELU; norms on both sides, windows and soft caps (2); q/k norms (3)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.models import llama
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, make_mlp
from jaxserve.models.family import Family
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.layers import Attention, make_norm


class Gemma2Layer(nnx.Module):
    """``x += norm(attention(norm(x))); x += norm(mlp(norm(x)))``."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, dtype)
        self.attention = Attention(config, config.layer_window(layer), dtype, rngs)
        self.attention_post_norm = make_norm(config, dtype)
        self.mlp_norm = make_norm(config, dtype)
        self.mlp = make_mlp(config, layer, dtype, rngs)
        self.mlp_post_norm = make_norm(config, dtype)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        rope: Rotation,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        attended, cache = self.attention(self.attention_norm(x), rows, rope, cache, inputs, layer)
        x = x + self.attention_post_norm(attended)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x), rows)), cache


class Gemma2(Decoder):
    layer_class: ClassVar[type[nnx.Module]] = Gemma2Layer


def read_gemma(raw: RawConfig, **differences: Any) -> ModelConfig:
    # Old files say "gelu" and mean its tanh form, which every Gemma was trained with.
    return llama.read(
        raw,
        norm="rms_plus_one",
        activation="gelu_tanh",
        embedding_scale=raw.size("hidden_size") ** 0.5,
        **differences,
    )


def read_gemma2(raw: RawConfig, **differences: Any) -> ModelConfig:
    layers = raw.count("num_hidden_layers")
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    return read_gemma(
        raw,
        attention_scale=raw.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=raw.optional_number("attn_logit_softcapping"),
        logits_softcap=raw.optional_number("final_logit_softcapping"),
        **{"windows": raw.windows(layers, alternating)} | differences,
    )


def read_gemma3(raw: RawConfig) -> ModelConfig:
    raw.require("use_bidirectional_attention", False)
    layers, every = raw.count("num_hidden_layers"), raw.integer("sliding_window_pattern")
    types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    head_dim = raw.head_dim()
    # One object of options for each kind of layer is how transformers 5 writes them.
    local = {"rope_parameters": {"rope_theta": raw.number("rope_local_base_freq")}}
    if raw.fields("rope_parameters").has("sliding_attention"):
        local = {"rope_parameters": raw.values["rope_parameters"]}
    local["max_position_embeddings"] = raw.values["max_position_embeddings"]
    return read_gemma2(
        raw,
        windows=raw.windows(layers, types),
        qk_norm=True,
        rope=raw.rope(head_dim, layers="full_attention"),
        local_rope=RawConfig(local, {}, raw.where, raw.prefix).rope(head_dim, layers="sliding_attention"),
    )


_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
weights_gemma2 = partial(llama.weights, norms=_NORMS)


def language_model_name(name: str) -> str | None:
    """The language model's tensors of a file that can also see."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
        return None
    # transformers 5 puts the model's prefix first, the hub's files have it second.
    return re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name).removeprefix("language_model.")


_GEMMA = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "head_dim": 256, "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "num_key_value_heads": 4, "num_attention_heads": 8, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | {
    "max_position_embeddings": 131072, "vocab_size": 262208, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip

GEMMA = Family(models="Gemma", read=read_gemma, weights=llama.weights, defaults=_GEMMA)
GEMMA2 = Family(models="Gemma 2", model=Gemma2, read=read_gemma2, weights=weights_gemma2, defaults=_GEMMA2)
GEMMA3 = Family(models="Gemma 3", model=Gemma2, read=read_gemma3, weights=weights_gemma2, defaults=_GEMMA3)
GEMMA3_VISION = Family(
    models="Gemma 3 that can see, on text alone",
    model=Gemma2,
    read=read_gemma3,
    weights=weights_gemma2,
    defaults=_GEMMA3,
    nested="text_config",
    tensor_name=language_model_name,
)
