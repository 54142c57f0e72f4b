"""What all families share: token embedding, decoder layers, final norm, output head."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs, Rotation
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import MLP, Attention, GatedMLP, make_norm, matrix, parameter
from jaxserve.models.moe import MoE
from jaxserve.models.rope import rope_frequencies, rope_tables


def make_mlp(config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> MoE | GatedMLP | MLP:
    """The feed-forward part of layer number ``layer``."""
    if config.experts is not None and layer in config.experts.layers:
        return MoE(config, dtype, rngs)
    return (GatedMLP if config.gated_mlp else MLP)(config, dtype, rngs)


class DecoderLayer(nnx.Module):
    """Pre-norm: ``x += attention(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, dtype)
        self.attention = self.make_attention(config, layer, dtype, rngs)
        self.mlp_norm = make_norm(config, dtype)
        self.mlp = make_mlp(config, layer, dtype, rngs)

    def make_attention(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        """What mixes the rows of layer number ``layer``, called as Attention is."""
        return Attention(config, config.layer_window(layer), dtype, rngs)

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
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), rows), cache


@jax.jit
def run_layer(
    layer: nnx.Module,
    x: jax.Array,
    rows: jax.Array | None,
    rope: Rotation,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    index: jax.Array,
) -> tuple[jax.Array, KVCache[jax.Array]]:
    return layer(x, rows, rope, cache, inputs, index)


class Decoder(nnx.Module):
    """``max_len`` is the longest sequence that will be served (see rope_frequencies)."""

    layer_class: ClassVar[type[nnx.Module]] = DecoderLayer
    """Called as a DecoderLayer is."""

    def __init__(self, config: ModelConfig, *, max_len: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.max_len = max_len
        vocab, hidden = config.vocab_size, config.hidden_size
        tied = config.tie_word_embeddings
        self.embedding = (matrix if tied else parameter)((vocab, hidden), ("vocab", "embed"), dtype, rngs)
        positions = config.max_position_embeddings
        self.positions = None if config.rope else parameter((positions, hidden), (None, "embed"), dtype, rngs)
        self.layers = nnx.List([self.layer_class(config, i, dtype, rngs) for i in range(config.num_layers)])
        self.norm = make_norm(config, dtype)
        self.lm_head = None if tied else matrix((vocab, hidden), ("vocab", "embed"), dtype, rngs)

    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        rows: jax.Array | None,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """Run a flat batch: token ids and positions ``int32[T]`` -> normed hidden states ``[T, hidden]``, new cache.

        rows: which of them count, as a Matrix takes it: a row's number, or -1 where nobody reads it.
        """
        x = self.embed(token_ids, positions)
        rotations = self.rotations(positions)
        # Unrolled: a scan would copy each layer's weights and, on GPUs, break the CUDA graph. Traced once all the same:
        # layers of one structure reuse the first one's trace, and XLA inlines the calls.
        for index, layer in enumerate(self.layers):
            number, rotation = jnp.int32(self.config.cache_layer(index)), self.layer_rotation(index, rotations)
            x, cache = run_layer(layer, x, rows, rotation, cache, inputs, number)
        return self.norm(x), cache

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """``int32[T]`` each -> what the first layer takes, ``[T, hidden]``."""
        table = self.embedding.get_value()
        x = table.lookup(token_ids) if self.lm_head is None else table[token_ids]
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        return x if self.positions is None else x + self.positions[...][positions]

    def logits(self, hidden: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """``[T, hidden]`` -> ``float32[T, vocab]``, or of the ``rows`` ``int32[R]`` only, as a Matrix takes them."""
        head = self.embedding if self.lm_head is None else self.lm_head
        logits = head.get_value().multiply(hidden, rows, jnp.dtype("float32"))
        cap = self.config.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def rotations(self, positions: jax.Array) -> tuple[Rotation, Rotation]:
        """Of the layers that see everything, and of those with a window."""
        config = self.config
        tables = {
            rope: rope_tables(
                *rope_frequencies(rope, trained=config.max_position_embeddings, max_len=self.max_len), positions
            )
            for rope in (config.rope, config.local_rope)
            if rope is not None
        }
        everywhere = None if config.rope is None else tables[config.rope]
        return everywhere, everywhere if config.local_rope is None else tables[config.local_rope]

    def layer_rotation(self, layer: int, rotations: tuple[Rotation, Rotation]) -> Rotation:
        everywhere, local = rotations
        return everywhere if self.config.layer_window(layer) is None else local
