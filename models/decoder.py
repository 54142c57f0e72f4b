"""What all families share: token embedding, decoder layers, final norm, output head."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.cpu_norm import add
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers import MLP, Attention, GatedMLP, Positions, matrix, parameter
from jaxserve.models.moe import MoE
from jaxserve.models.norms import Norm, make_norm
from jaxserve.models.rope import rope_frequencies, rope_tables, temperatures


def make_mlp(config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> MoE | GatedMLP | MLP:
    """The feed-forward part of layer number ``layer``."""
    if config.experts is not None and layer in config.experts.layers:
        return MoE(config, dtype, rngs)
    return make_dense_mlp(config, layer, dtype, rngs)


def make_dense_mlp(config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> GatedMLP | MLP:
    """The same without experts."""
    return (GatedMLP if config.gated_mlp else MLP)(config, config.of_layer(layer).intermediate_size, dtype, rngs)


class DecoderLayer(nnx.Module):
    """``x += after(attention(before(x))); x += after(mlp(before(x)))``, with the norms that ``norm_places`` names."""

    def __init__(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        before, after = config.norm_places != "after", config.norm_places != "before"
        self.residual_scale = config.residual_scale
        self.attention_norm = make_norm(config, dtype) if before else None
        self.attention = self.make_attention(config, layer, dtype, rngs)
        self.attention_post_norm = make_norm(config, dtype) if after else None
        self.mlp_norm = make_norm(config, dtype) if before else None
        self.mlp = self.make_mlp(config, layer, dtype, rngs)
        self.mlp_post_norm = make_norm(config, dtype) if after else None

    def make_mlp(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        """The feed-forward part of layer number ``layer``, called as GatedMLP is."""
        return make_mlp(config, layer, dtype, rngs)

    def make_attention(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        """What mixes the rows of layer number ``layer``, called as Attention is."""
        return Attention(config, layer, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        positions: Positions,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        attended, cache = self.attention(_normed(self.attention_norm, x), rows, positions, cache, inputs, layer)
        x = self._add(x, _normed(self.attention_post_norm, attended))
        return self._add(x, _normed(self.mlp_post_norm, self.feed_forward(x, rows))), cache

    def feed_forward(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """``[T, hidden]`` -> the same, normed before and not yet behind."""
        return self.mlp(_normed(self.mlp_norm, x), rows)

    def _add(self, x: jax.Array, found: jax.Array) -> jax.Array:
        return add(x, found if self.residual_scale == 1 else found * jnp.asarray(self.residual_scale, found.dtype))


def _normed(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


@jax.jit
def run_layer(
    layer: nnx.Module,
    x: jax.Array,
    rows: jax.Array | None,
    positions: Positions,
    cache: KVCache[jax.Array],
    inputs: AttentionInputs,
    index: jax.Array,
) -> tuple[jax.Array, KVCache[jax.Array]]:
    return layer(x, rows, positions, cache, inputs, index)


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
        probes = config.num_probes
        self.probes = parameter((probes, hidden), (None, "embed"), dtype, rngs) if probes else None
        positions = config.max_position_embeddings
        self.positions = None if config.rope else parameter((positions, hidden), (None, "embed"), dtype, rngs)
        self.layers = nnx.List([self.layer_class(config, i, dtype, rngs) for i in range(config.num_layers)])
        self.norm = make_norm(config, dtype)
        self.lm_head = None if tied else matrix((vocab, hidden), ("vocab", "embed"), dtype, rngs)
        self.lm_head_bias = parameter((vocab,), ("vocab",), dtype, rngs) if config.head_bias else None

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
        taken = self.beside(token_ids, positions)
        # Unrolled: a scan would copy each layer's weights and, on GPUs, break the CUDA graph. Traced once all the same:
        # layers of one structure reuse the first one's trace, and XLA inlines the calls.
        for index, layer in enumerate(self.layers):
            x, cache = run_layer(layer, x, rows, taken, cache, inputs, jnp.int32(self.config.cache_layer(index)))
        return self.norm(x), cache

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """``int32[T]`` each -> what the first layer takes, ``[T, hidden]``."""
        table = self.embedding.get_value()
        known = token_ids if self.probes is None else jnp.maximum(token_ids, 0)
        x = table.lookup(known) if self.lm_head is None else table[known]
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.probes is not None:
            x = jnp.where(token_ids[:, None] < 0, self.probes[...][jnp.maximum(-1 - token_ids, 0)], x)
        return x if self.positions is None else x + self.positions[...][positions]

    def logits(self, hidden: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """``[T, hidden]`` -> ``float32[T, vocab]``, or of the ``rows`` ``int32[R]`` only, as a Matrix takes them."""
        head = self.embedding if self.lm_head is None else self.lm_head
        logits = head.get_value().multiply(hidden, rows, jnp.dtype("float32"))
        if self.lm_head_bias is not None:
            logits = logits + self.lm_head_bias[...].astype(logits.dtype)
        if self.config.logits_scale != 1:
            logits = logits * self.config.logits_scale
        cap = self.config.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def beside(self, token_ids: jax.Array, positions: jax.Array) -> Positions:
        """What layers take of ``int32[T]`` each, beside what the layers before them made."""
        config = self.config
        tables = {
            rope: rope_tables(
                *rope_frequencies(rope, trained=config.max_position_embeddings, max_len=self.max_len), positions
            )
            for rope in (config.rope, config.local_rope)
            if rope is not None
        }
        everywhere = None if config.rope is None else tables[config.rope]
        local = everywhere if config.local_rope is None else tables[config.local_rope]
        return Positions(
            everywhere, local, None if config.temperature is None else temperatures(config.temperature, positions)
        )
