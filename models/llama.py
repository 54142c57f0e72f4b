"""The Llama family: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.attention import AttentionInputs, KVCache
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import (
    Attention,
    GatedMLP,
    RMSNorm,
    fuse_gate_up,
    fuse_qkv,
    linear,
    parameter,
    split_heads,
)
from jaxserve.models.rope import rope_frequencies, rope_tables
from jaxserve.models.weights import Weight, unchanged


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = GatedMLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        attended, cache = self.attention(self.attention_norm(x), rope, cache, inputs, layer)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


_run_layer = jax.jit(DecoderLayer.__call__)


class Llama(nnx.Module):
    """``max_len`` is the longest sequence that will be served (see rope_frequencies)."""

    def __init__(self, config: ModelConfig, *, max_len: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.max_len = max_len
        self.embedding = parameter((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype, rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = (
            None if config.tie_word_embeddings else parameter(self.embedding.shape, ("vocab", "embed"), dtype, rngs)
        )

    def __call__(
        self, token_ids: jax.Array, positions: jax.Array, cache: KVCache[jax.Array], inputs: AttentionInputs
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """Run a flat batch: token ids and positions ``int32[T]`` -> normed hidden states ``[T, hidden]``, new cache."""
        x = self.embedding[...][token_ids]
        frequencies, scale = rope_frequencies(self.config, self.max_len)
        rope = rope_tables(frequencies, scale, positions)
        # Unrolled: a scan would copy each layer's weights and, on GPUs, break the CUDA graph. Traced once all the same:
        # the layers have one structure, so jit reuses the first one's trace, and XLA inlines the calls.
        for index, layer in enumerate(self.layers):
            x, cache = _run_layer(layer, x, rope, cache, inputs, jnp.int32(index))
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """``[R, hidden]`` -> ``float32[R, vocab]``."""
        head = self.embedding if self.lm_head is None else self.lm_head
        return linear(hidden, head[...], out_dtype=jnp.dtype("float32"))

    @staticmethod
    def weight_map(config: ModelConfig) -> dict[str, Weight]:
        """Parameter path -> the Hugging Face tensors it is built from."""
        weights = {
            "embedding": Weight(("model.embed_tokens.weight",), unchanged),
            "norm.weight": Weight(("model.norm.weight",), unchanged),
        }
        if not config.tie_word_embeddings:
            weights["lm_head"] = Weight(("lm_head.weight",), unchanged)
        for index in range(config.num_layers):
            weights |= _layer_weights(config, index)
        return weights


def _layer_weights(config: ModelConfig, index: int) -> dict[str, Weight]:
    ours, theirs = f"layers.{index}", f"model.layers.{index}"
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"

    def names(prefix: str, kind: str, *projections: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{p}_proj.{kind}" for p in projections)

    weights = {
        f"{ours}.attention_norm.weight": Weight((f"{theirs}.input_layernorm.weight",), unchanged),
        f"{ours}.mlp_norm.weight": Weight((f"{theirs}.post_attention_layernorm.weight",), unchanged),
        f"{ours}.attention.qkv": Weight(names(attention, "weight", "q", "k", "v"), partial(fuse_qkv, config)),
        f"{ours}.attention.out": Weight(names(attention, "weight", "o"), partial(split_heads, config)),
        f"{ours}.mlp.gate_up": Weight(names(mlp, "weight", "gate", "up"), fuse_gate_up),
        f"{ours}.mlp.down": Weight(names(mlp, "weight", "down"), unchanged),
    }
    if config.attention_bias:
        weights[f"{ours}.attention.qkv_bias"] = Weight(
            names(attention, "bias", "q", "k", "v"), partial(fuse_qkv, config)
        )
        weights[f"{ours}.attention.out_bias"] = Weight(names(attention, "bias", "o"), unchanged)
    if config.mlp_bias:
        weights[f"{ours}.mlp.gate_up_bias"] = Weight(names(mlp, "bias", "gate", "up"), fuse_gate_up)
        weights[f"{ours}.mlp.down_bias"] = Weight(names(mlp, "bias", "down"), unchanged)
    return weights
