"""Multi-head latent attention (arXiv 2405.04434, section 2.1): what is kept of a token is one latent for all heads.

A head's key is made from the latent by a matrix, its score is the product of key and query, and so that of the latent
and of the query multiplied by the matrix. Its output is the weighted sum of values, which another matrix makes from the
latents, and so what that makes of the weighted sum of latents. With both matrices absorbed, as the paper has it for
decodes, this is attention of all query heads over one KV head, whose key is its value too. Rows of every kind go this
way: no key or value of a head is ever made.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.kernels.attention import paged_attention, rotate_and_write
from jaxserve.kernels.cache import KVCache
from jaxserve.kernels.inputs import AttentionInputs
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder, DecoderLayer
from jaxserve.models.layers import Positions, matrix, parameter
from jaxserve.models.matrix import MatrixLayout
from jaxserve.models.norms import RMSNorm
from jaxserve.models.weights import Part, Weight, whole

LATENT_EPS = 1e-6
"""Of the norms of latents, whatever the model's other norms have; so in DeepSeek's code and in transformers'."""


class LatentAttention(nnx.Module):
    """``down`` is one matrix ``[query_rank + rope.dim + rank, hidden]``: what queries are made from, a token's rotated
    key and its latent. ``query`` is ``[kv_heads, group, rope.dim + key_dim, query_rank]``, or of the hidden state.
    ``key_up`` ``[kv_heads, group, key_dim, rank]`` and ``value_up`` ``[kv_heads, group, value_dim, rank]`` would make
    keys and values. The KV heads are the devices' copies of the one.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.latent is not None
        self.config, self.latent = config, config.latent
        latent, hidden, heads = self.latent, config.hidden_size, (config.num_held_kv_heads, config.group_size)
        by_head = ("kv_heads", None, None, None)
        self.rope_dim = config.head_dim - latent.rank
        self.query_rank = latent.query_rank or 0
        self.down = matrix((self.query_rank + config.head_dim, hidden), (None, "embed"), dtype, rngs)
        self.query_norm = RMSNorm((self.query_rank,), LATENT_EPS, dtype, axes=(None,)) if self.query_rank else None
        self.latent_norm = RMSNorm((latent.rank,), LATENT_EPS, dtype, axes=(None,))
        queries = (*heads, self.rope_dim + latent.key_dim, self.query_rank or hidden)
        self.query = matrix(queries, by_head, dtype, rngs, MatrixLayout(num_outputs=3))
        self.key_up = parameter((*heads, latent.key_dim, latent.rank), by_head, dtype, rngs)
        self.value_up = parameter((*heads, latent.value_dim, latent.rank), by_head, dtype, rngs)
        out = (hidden, *heads, latent.value_dim)
        self.out = matrix(out, ("embed", "kv_heads", None, None), dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rows: jax.Array | None,
        positions: Positions,
        cache: KVCache[jax.Array],
        inputs: AttentionInputs,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache[jax.Array]]:
        """As Attention's, with keys that are values."""
        c, rope_dim = self.config, self.rope_dim
        heads = len(x), c.num_held_kv_heads, c.group_size
        down = self.down.get_value().multiply(x, rows)
        low, turned, latent = jnp.split(down, (self.query_rank, self.query_rank + rope_dim), axis=-1)
        key = jnp.concatenate((turned, self.latent_norm(latent)), axis=-1)

        asking = x if self.query_norm is None else self.query_norm(low)
        q = self.query.get_value().multiply(asking, rows).reshape(*heads, -1)
        absorbed = jnp.einsum("tkgd,kgdr->tkgr", q[..., rope_dim:], self.key_up[...])
        q = jnp.concatenate((q[..., :rope_dim], absorbed), axis=-1)

        keys = jnp.broadcast_to(key[:, None, None], (*heads[:2], 1, c.head_dim))
        q, cache = rotate_and_write(jnp.concatenate((q, keys), axis=2), positions.everywhere, cache, inputs, layer)
        # Of the weighted sums of keys, the rotated part is nobody's value.
        sums = paged_attention(q, cache, inputs, layer, scale=c.attention_scale or c.head_dim**-0.5)
        sums = sums.reshape(*heads, c.head_dim)[..., rope_dim:]
        attended = jnp.einsum("tkgr,kgdr->tkgd", sums, self.value_up[...])
        return self.out.get_value().multiply(attended.reshape(len(x), -1), rows), cache


class LatentLayer(DecoderLayer):
    """With attention over latents."""

    def make_attention(self, config: ModelConfig, layer: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
        return LatentAttention(config, dtype, rngs)


class LatentDecoder(Decoder):
    """Of such layers."""

    layer_class = LatentLayer


def latent_weights(config: ModelConfig, layer: int, ours: str, theirs: str) -> dict[str, Weight]:
    """LatentAttention at ``ours``, from tensors with DeepSeek's names."""
    latent = config.latent
    assert latent is not None
    theirs += ".self_attn"
    heads, query_rank = (config.num_held_kv_heads, config.group_size), latent.query_rank or 0
    key_width, up_width = latent.key_dim + config.head_dim - latent.rank, latent.key_dim + latent.value_dim

    def of_heads(width: int, dims: slice, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(*heads, width, tensor.shape[1])[:, :, dims]

    def split_heads(tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(-1, *heads, latent.value_dim)

    def rows(dims: slice, tensor: np.ndarray) -> np.ndarray:
        return tensor[dims]

    kv, up = f"{theirs}.kv_a_proj_with_mqa.weight", f"{theirs}.kv_b_proj.weight"
    query = f"{theirs}.{'q_b_proj' if query_rank else 'q_proj'}.weight"
    down = [Part(kv, partial(rows, dims), (query_rank + at,)) for dims, at in _rotated_first(config, latent.rank)]
    found = {
        f"{ours}.query": tuple(
            Part(query, partial(of_heads, key_width, dims), (0, 0, at))
            for dims, at in _rotated_first(config, latent.key_dim)
        ),
        f"{ours}.latent_norm.weight": whole(f"{theirs}.kv_a_layernorm.weight"),
        f"{ours}.key_up": whole(up, partial(of_heads, up_width, slice(latent.key_dim))),
        f"{ours}.value_up": whole(up, partial(of_heads, up_width, slice(latent.key_dim, None))),
        f"{ours}.out": whole(f"{theirs}.o_proj.weight", split_heads),
    }
    if query_rank:
        down.append(Part(f"{theirs}.q_a_proj.weight"))
        found[f"{ours}.query_norm.weight"] = whole(f"{theirs}.q_a_layernorm.weight")
    return found | {f"{ours}.down": tuple(down)}


def _rotated_first(config: ModelConfig, width: int) -> list[tuple[slice, int]]:
    """Which of a tensor's dimensions, ``width`` and behind them the rotated ones, lie here at which place. Here those
    come first, and the two that are rotated together are half of them apart."""
    rope = config.rope
    assert rope is not None
    plain = (slice(width), rope.dim)
    if not rope.interleaved:
        return [(slice(width, None), 0), plain]
    return [(slice(width, None, 2), 0), (slice(width + 1, None, 2), rope.dim // 2), plain]
