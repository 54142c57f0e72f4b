"""Sampling on the device: greedy and random rows in one program, without sorting the vocabulary.

Order of the filters as in vLLM: temperature, min-p, top-k, top-p. A row's randomness depends on its seed and on the
token's position alone, so a request's output does not depend on what it is batched with or on preemptions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.request import MAX_LOGPROBS

NEVER = -jnp.inf
ARGMAX_BLOCK = 128


class SamplingInputs(NamedTuple):
    """Sampling parameters of the step's sequences, one entry a sequence slot."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    """``float32[S]`` each."""
    top_k: jax.Array
    """0 or less keeps the whole vocabulary."""
    seeds: jax.Array
    positions: jax.Array
    """``int32[S]`` each; positions are those of the tokens to sample."""


class TokenLogprobs[Array](NamedTuple):
    """Log-probabilities of given tokens and of the likeliest alternatives, for R rows."""

    chosen: Array
    """``float32[R]``"""
    rank: Array
    """``int32[R]``, 1 for the likeliest."""
    top_ids: Array
    top: Array
    """``[R, MAX_LOGPROBS]``, likeliest first."""


def sample(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """``float32[S, vocab]`` -> ``int32[S]``."""
    greedy = _argmax(logits)
    random = inputs.temperature > 0
    # The branch is skipped at run time when every row is greedy.
    drawn = jax.lax.cond(jnp.any(random), lambda: _draw(logits, inputs), lambda: greedy)
    return jnp.where(random, drawn, greedy)


def _draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    scaled = logits / jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]
    # p >= min_p * p_max, in logits.
    floor = scaled.max(axis=-1, keepdims=True) + jnp.log(inputs.min_p)[:, None]
    scaled = jnp.where(scaled >= floor, scaled, NEVER)
    limited_k, limited_p = inputs.top_k > 0, inputs.top_p < 1
    scaled = jax.lax.cond(
        jnp.any(limited_k),
        lambda x: jnp.where(limited_k[:, None], _keep_top(x, jnp.ones_like(x), inputs.top_k), x),
        lambda x: x,
        scaled,
    )
    scaled = jax.lax.cond(
        jnp.any(limited_p),
        lambda x: jnp.where(limited_p[:, None], _keep_top(x, jax.nn.softmax(x), inputs.top_p), x),
        lambda x: x,
        scaled,
    )
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        inputs.seeds, inputs.positions
    )
    # Gumbel-max: the argmax of perturbed logits is a draw from their softmax.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return _argmax(scaled + noise)


def _argmax(x: jax.Array) -> jax.Array:
    """``float32[S, vocab]`` -> ``int32[S]``, the first of equals.

    First the block, by its largest entry, then the entry: XLA's argmax on CPUs is a scalar loop, a maximum is not.
    """
    rows, vocab = x.shape
    blocks = jnp.pad(x, ((0, 0), (0, -vocab % ARGMAX_BLOCK)), constant_values=NEVER).reshape(rows, -1, ARGMAX_BLOCK)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)
    entries = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * ARGMAX_BLOCK + jnp.argmax(entries, axis=-1)).astype(jnp.int32)


def _keep_top(x: jax.Array, weights: jax.Array, goal: jax.Array) -> jax.Array:
    """Keep the fewest largest entries of each row whose ``weights`` add up to ``goal``; the others become -inf.

    The cut-off is found bit by bit on integers that sort like the floats: 32 passes instead of a sort. Entries equal
    to the cut-off are all kept.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    keys = jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))
    goal = jnp.minimum(goal.astype(jnp.float32), weights.sum(axis=-1) * (1 - 1e-6))

    def try_bit(i: jax.Array, cut: jax.Array) -> jax.Array:
        candidate = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(keys >= candidate[:, None], weights, 0.0).sum(axis=-1) >= goal
        return jnp.where(reached, candidate, cut)

    cut = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x.shape[0], jnp.uint32))
    return jnp.where(keys >= cut[:, None], x, NEVER)


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs[jax.Array]:
    """Of ``tokens`` ``[R]`` under the unmodified distribution of ``logits`` ``[R, vocab]``."""
    # Relative to the largest: logits far from zero would cost the difference its last digits.
    logits = logits - logits.max(axis=-1, keepdims=True)
    norm = jnp.log(jnp.exp(logits).sum(axis=-1))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = (logits > chosen).sum(axis=-1, dtype=jnp.int32) + 1
    top, top_ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return TokenLogprobs(chosen[:, 0] - norm, rank, top_ids, top - norm[:, None])


def optional_logprobs(wanted: jax.Array, logits: jax.Array, tokens: jax.Array) -> TokenLogprobs[jax.Array]:
    """``token_logprobs`` when the scalar ``wanted`` is set, zeros otherwise, decided on the device."""
    shapes = jax.eval_shape(token_logprobs, logits, tokens)
    return jax.lax.cond(
        wanted,
        lambda: token_logprobs(logits, tokens),
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    )
