"""The text of Gemma 4: layers with a window have heads of their own, the last layers read keys and values of earlier
ones, layers have embeddings of their own, and experts stand beside the MLP."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.models import gemma, llama
from jaxserve.models.config import Experts, LocalHeads, ModelConfig, OwnEmbedding
from jaxserve.models.decoder import Decoder, DecoderLayer, make_dense_mlp
from jaxserve.models.family import Family, language_model_name
from jaxserve.models.hf_config import RawConfig, all_but_every
from jaxserve.models.layers import ACTIVATIONS, Attention, Positions, ReadingAttention, Tokens, matrix, parameter
from jaxserve.models.moe import MoE
from jaxserve.models.norms import make_norm
from jaxserve.models.reshape import norm_weights, queries, queries_and_keys, separate_qkv, split_heads
from jaxserve.models.weights import Part, Weight, whole


class LayerEmbedding(nnx.Module):
    """What a layer's own embedding of a row's token adds to it: ``norm(up(act(gate(x)) * e))``, with ``e`` made of the
    token's entry in ``table`` and of a projection of what the first layer took."""

    def __init__(self, config: ModelConfig, own: OwnEmbedding, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.activation, hidden = config.activation, config.hidden_size
        self.table = parameter((own.vocab_size, own.dim), ("vocab", None), dtype, rngs)
        self.projection = matrix((own.dim, hidden), (None, "embed"), dtype, rngs)
        self.projection_norm = make_norm(config, dtype, own.dim)
        self.gate = matrix((own.dim, hidden), (None, "embed"), dtype, rngs)
        self.up = matrix((hidden, own.dim), ("embed", None), dtype, rngs)
        self.post_norm = make_norm(config, dtype)

    def __call__(self, x: jax.Array, rows: jax.Array | None, tokens: Tokens) -> jax.Array:
        """``[T, hidden]`` -> the same."""
        entries = self.table[...][tokens.ids]
        entries = entries * jnp.asarray(entries.shape[-1] ** 0.5, entries.dtype)
        projected = self.projection.get_value().multiply(tokens.embedded, rows) * x.shape[-1] ** -0.5
        embedded = (self.projection_norm(projected) + entries) * 2**-0.5
        gated = ACTIVATIONS[self.activation](self.gate.get_value().multiply(x, rows)) * embedded
        return self.post_norm(self.up.get_value().multiply(gated, rows))


class ExpertsBeside(nnx.Module):
    """Experts that see what the MLP beside them sees, normed for themselves, and a router that norms it again."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.experts is not None
        self.moe = MoE(config, dtype, rngs)
        self.router_norm, self.norm = make_norm(config, dtype), make_norm(config, dtype)
        self.expert_scale = parameter((config.experts.count,), (None,), dtype, rngs)
        self.mlp_post_norm, self.post_norm = make_norm(config, dtype), make_norm(config, dtype)

    def __call__(self, x: jax.Array, rows: jax.Array | None, from_mlp: jax.Array) -> jax.Array:
        """What the MLP has made of the rows ``x``, ``[T, hidden]``, and what experts make of them."""
        weights, chosen = self.moe.choose(self.router_norm(x) * x.shape[-1] ** -0.5, rows)
        choice = weights * self.expert_scale[...][chosen], chosen
        return self.mlp_post_norm(from_mlp) + self.post_norm(self.moe.mixed(self.norm(x), rows, choice))


class Gemma4Layer(DecoderLayer):
    """``(x + attention + mlp + own embedding) * scale``."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, dtype, rngs)
        own = config.own_embedding
        self.experts = None if config.experts is None else ExpertsBeside(config, dtype, rngs)
        self.embedding = None if own is None else LayerEmbedding(config, own, dtype, rngs)
        self.scale = parameter((1,), (None,), dtype, rngs)

    def make_attention(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        return (Attention if config.kv_layer(layer) == layer else ReadingAttention)(config, layer, dtype, rngs)

    def make_mlp(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        return make_dense_mlp(config, layer, dtype, rngs)

    def feed_forward(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        y = super().feed_forward(x, rows)
        return y if self.experts is None else self.experts(x, rows, y)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        positions: Positions,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        x, cache = super().__call__(x, rows, positions, cache, inputs, layer)
        if self.embedding is not None and positions.tokens is not None:
            x = x + self.embedding(x, rows, positions.tokens)
        return x * self.scale[...], cache


class Gemma4Decoder(Decoder):
    layer_class = Gemma4Layer

    def beside(self, token_ids: jax.Array, positions: jax.Array) -> Positions:
        found = super().beside(token_ids, positions)
        if self.config.own_embedding is None:
            return found
        return found._replace(tokens=Tokens(token_ids, self.embed(token_ids, positions)))


def read(raw: RawConfig) -> ModelConfig:
    """A config.json as Google wrote it, or as transformers 5 does."""
    if raw.text("use_bidirectional_attention") == "all":
        raise raw.error("use_bidirectional_attention", "vision or null")
    raw.require("attention_bias", False)
    layers = raw.count("num_hidden_layers")
    types = raw.texts("layer_types") or all_but_every(6, layers)
    raw.values["layer_types"] = [*types[:-1], "full_attention"]  # whatever the file says, as in transformers
    raw.integer("sliding_window")  # null would leave layers whose heads are those of a window
    windows = raw.windows(layers, types)
    local = LocalHeads(num_kv_heads=raw.count("num_key_value_heads"), head_dim=raw.head_dim())
    full = _full_heads(raw, local, [i for i, window in enumerate(windows or (None,) * layers) if window is None])
    shared = raw.integer("num_kv_shared_layers", low=0, high=layers - 1)
    return llama.read(
        raw,
        activation=raw.activation("hidden_activation"),
        norm_places="around",
        embedding_scale=raw.size("hidden_size") ** 0.5,
        logits_softcap=raw.optional_number("final_logit_softcapping"),
        num_kv_heads=full.num_kv_heads,
        head_dim=full.head_dim,
        local_heads=None if full == local or not windows else local,
        windows=windows,
        rope=raw.rope(full.head_dim, layers="full_attention"),
        local_rope=raw.local_rope(local.head_dim, 1e4),
        qk_norm="head",
        value_norm=True,
        values_are_keys=raw.flag("attention_k_eq_v"),
        attention_scale=1.0,
        num_kv_shared_layers=shared,
        shared_mlp_factor=2 if raw.flag("use_double_wide_mlp") else 1,
        own_embedding=_own_embedding(raw),
        experts=_experts(raw, layers),
    )


def _full_heads(raw: RawConfig, local: LocalHeads, layers: list[int]) -> LocalHeads:
    """Of the layers that see everything: ``global_head_dim`` and ``num_global_key_value_heads``, in transformers 5's
    files ``per_layer_config``."""
    if not raw.has("per_layer_config"):
        heads = raw.count("num_global_key_value_heads", local.num_kv_heads)
        heads = heads if raw.flag("attention_k_eq_v") else local.num_kv_heads
        return LocalHeads(num_kv_heads=heads, head_dim=raw.size("global_head_dim"))
    by_layer = raw.fields("per_layer_config")
    found = {
        LocalHeads(
            num_kv_heads=layer.integer("num_key_value_heads", local.num_kv_heads),
            head_dim=layer.integer("head_dim", local.head_dim),
        )
        for layer in map(by_layer.fields, map(str, layers))
    }
    if len(found) != 1 or not by_layer.values.keys() <= set(map(str, layers)):
        raise raw.error("per_layer_config", "the same of all layers of full_attention, and of no others")
    return found.pop()


def _own_embedding(raw: RawConfig) -> OwnEmbedding | None:
    dim, vocab = raw.integer("hidden_size_per_layer_input", low=0), raw.size("vocab_size")
    if not dim:
        return None
    entries = raw.size("vocab_size_per_layer_input")
    if entries < vocab:
        raise raw.error("vocab_size_per_layer_input", f"at least vocab_size {vocab}")
    return OwnEmbedding(vocab_size=entries, dim=dim)


def _experts(raw: RawConfig, layers: int) -> Experts | None:
    if not raw.flag("enable_moe_block"):
        return None
    if not raw.has("num_experts"):
        raise raw.error("enable_moe_block", "false without num_experts")
    return Experts(
        count=raw.count("num_experts"),
        per_token=raw.count("top_k_experts"),
        intermediate_size=raw.size("moe_intermediate_size"),
        normalise=True,
        layers=tuple(range(layers)),
    )


def _attention_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    kept, config = config.kv_layer(layer) == layer, config.of_layer(layer)
    theirs += ".self_attn"
    if not kept:
        qkv = queries(config, theirs)
    elif config.values_are_keys and config.layer_window(layer) is None:
        qkv = queries_and_keys(config, theirs)
    else:
        qkv = separate_qkv(config, theirs)
    found = {f"{ours}.qkv": qkv, f"{ours}.out": whole(f"{theirs}.o_proj.weight", partial(split_heads, config))}
    for norm in ("q_norm", "k_norm") if kept else ("q_norm",):
        found |= norm_weights(config, f"{ours}.{norm}", f"{theirs}.{norm}")
    return found


def _own_weights(config: ModelConfig, layer: int, dim: int) -> dict[str, Weight]:
    ours, theirs = f"layers.{layer}.embedding", f"model.layers.{layer}"

    def share(tensor: np.ndarray) -> np.ndarray:
        return tensor[layer * dim : (layer + 1) * dim]

    return {
        f"{ours}.table": (Part("model.embed_tokens_per_layer.weight", lambda tensor: share(tensor.T).T),),
        f"{ours}.projection": (Part("model.per_layer_model_projection.weight", share),),
        f"{ours}.gate": whole(f"{theirs}.per_layer_input_gate.weight"),
        f"{ours}.up": whole(f"{theirs}.per_layer_projection.weight"),
        **norm_weights(config, f"{ours}.projection_norm", "model.per_layer_projection_norm"),
        **norm_weights(config, f"{ours}.post_norm", f"{theirs}.post_per_layer_input_norm"),
    }


def _expert_weights(config: ModelConfig, layer: int, count: int) -> dict[str, Weight]:
    ours, theirs = f"layers.{layer}.experts", f"model.layers.{layer}"

    def halves(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(count, 2, -1, tensor.shape[-1]).transpose(1, 0, 3, 2)

    return {
        f"{ours}.moe.router": whole(f"{theirs}.router.proj.weight"),
        f"{ours}.moe.gate_up": whole(f"{theirs}.experts.gate_up_proj", halves),
        f"{ours}.moe.down": whole(f"{theirs}.experts.down_proj", lambda tensor: tensor.transpose(0, 2, 1)),
        f"{ours}.router_norm.weight": whole(f"{theirs}.router.scale"),
        f"{ours}.expert_scale": whole(f"{theirs}.router.per_expert_scale"),
        **norm_weights(config, f"{ours}.norm", f"{theirs}.pre_feedforward_layernorm_2"),
        **norm_weights(config, f"{ours}.mlp_post_norm", f"{theirs}.post_feedforward_layernorm_1"),
        **norm_weights(config, f"{ours}.post_norm", f"{theirs}.post_feedforward_layernorm_2"),
    }


def weights(config: ModelConfig) -> dict[str, Weight]:
    """Every parameter's."""
    found = gemma.weights_gemma2(config, attention=_attention_weights)
    for layer in range(config.num_layers):
        found[f"layers.{layer}.scale"] = whole(f"model.layers.{layer}.layer_scalar")
        if config.own_embedding is not None:
            found |= _own_weights(config, layer, config.own_embedding.dim)
        if config.experts is not None:
            found |= _expert_weights(config, layer, config.experts.count)
    return found


def _unused(config: ModelConfig) -> list[str]:
    """What files have of the layers that read others' keys and values."""
    shared = range(config.num_layers - config.num_kv_shared_layers, config.num_layers)
    names = ("k_proj", "v_proj", "k_norm", "v_norm")
    return [f"model.layers.{layer}.self_attn.{name}.weight" for layer in shared for name in names]


def _tensor_name(name: str) -> str | None:
    """Not of what sees or hears."""
    if re.match(r"(model\.)?(audio_tower|embed_(vision|audio)|vision_embedder)\.", name):
        return None
    return language_model_name(name)


_ROPE: dict[str, Any] = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_UNIFIED = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "head_dim": 256, "num_key_value_heads": 4,
    "num_attention_heads": 8, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 1024, "rope_parameters": _ROPE, "global_head_dim": 512, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip
_GEMMA4 = _UNIFIED | {
    "max_position_embeddings": 131072, "sliding_window": 512, "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
}  # fmt: skip

GEMMA4 = Family(
    models="Gemma 4",
    read=read,
    weights=weights,
    model=Gemma4Decoder,
    defaults=_GEMMA4,
    tensor_name=_tensor_name,
    unused=_unused,
)
GEMMA4_VISION = replace(GEMMA4, models="Gemma 4 that can see and hear, on text alone", nested="text_config")
GEMMA4_UNIFIED_VISION = replace(GEMMA4_VISION, models="Gemma 4 12B, on text alone", defaults=_UNIFIED)
