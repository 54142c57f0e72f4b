"""Sampling on the device: greedy and random rows in one program, without sorting the vocabulary.

Order of the filters as in vLLM: temperature, min-p, top-k, top-p. A row's randomness depends on its seed and on the
token's position alone, so a request's output does not depend on what it is batched with or on preemptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEVER = -jnp.inf
ARGMAX_BLOCK = 128
SEARCH_BLOCK, SEARCH_BLOCKS = 64, 128
"""Entries of a block, and blocks that are searched first: enough for any top-k below 128, and for what top-p keeps of
a prediction that is not flat."""
FARTHEST = np.uint32(2**32 - 1)


class SamplingInputs(NamedTuple):
    """Sampling parameters of a step's draws, under the names of its fields."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    """``float32[R]`` each."""
    top_k: jax.Array
    """0 or less keeps the whole vocabulary."""
    seeds: jax.Array
    draw_positions: jax.Array
    """``int32[R]`` each; positions are those of the tokens to sample."""


class TokenLogprobs[Array](NamedTuple):
    """Log-probabilities of given tokens and of the likeliest alternatives, for R rows."""

    chosen: Array
    """``float32[R]``"""
    rank: Array
    """``int32[R]``, 1 for the likeliest."""
    top_ids: Array
    top: Array
    """``[R, num_top]``, likeliest first."""


def sample(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """``float32[R, vocab]`` -> ``int32[R]``."""
    greedy = _argmax(logits)
    best = jnp.take_along_axis(logits, greedy[:, None], axis=-1)
    # There is nothing to draw from where a logit is infinite or not a number.
    random = (inputs.temperature > 0) & jnp.isfinite(best[:, 0])
    # Limits do not matter to the other rows, and cost nothing where no row has any.
    inputs = inputs._replace(top_k=jnp.where(random, inputs.top_k, 0), top_p=jnp.where(random, inputs.top_p, 1.0))
    # The branch is skipped at run time when every row is greedy.
    drawn = jax.lax.cond(jnp.any(random), lambda: _draw(logits - best, inputs), lambda: greedy)
    return jnp.where(random, drawn, greedy)


def _draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """``logits``: relative to the row's largest, so that however small a temperature leaves that one as it is."""
    scaled = logits / jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]
    # p >= min_p * p_max, in logits.
    scaled = jnp.where(scaled >= jnp.log(inputs.min_p)[:, None], scaled, NEVER)
    scaled = jax.lax.cond(
        jnp.any((inputs.top_k > 0) | (inputs.top_p < 1)), lambda x: _keep_top(x, inputs), lambda x: x, scaled
    )
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        inputs.seeds, inputs.draw_positions
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


def _keep_top(x: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """What top-k, then top-p keep of ``x`` ``[S, vocab]``, whose largest entries are 0; the others become -inf.

    Nearly always that lies in a few blocks of the vocabulary, those with the largest entries: they are gathered and
    searched. The whole vocabulary is searched for rows only that would keep what may lie outside of those blocks.
    """
    rows, vocab = x.shape
    mass = jnp.exp(x).sum(axis=-1)
    if vocab <= SEARCH_BLOCK * SEARCH_BLOCKS:
        cut = _cut_offs(x, mass, inputs).both
    else:
        blocks = jnp.pad(x, ((0, 0), (0, -vocab % SEARCH_BLOCK)), constant_values=NEVER)
        blocks = blocks.reshape(rows, -1, SEARCH_BLOCK)
        largest, chosen = jax.lax.top_k(blocks.max(axis=-1), SEARCH_BLOCKS)
        candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, -1)
        among_them = _cut_offs(candidates, mass, inputs)
        # Nothing outside is nearer than the nearest of the last block, so up to there they are all there is.
        reach = jnp.where(inputs.top_k > 0, among_them.top_k, among_them.both)
        found = (reach < _distance(largest[:, -1])) | ~((inputs.top_k > 0) | (inputs.top_p < 1))
        cut = jax.lax.cond(
            jnp.all(found),
            lambda: among_them.both,
            lambda: jnp.where(found, among_them.both, _cut_offs(x, mass, inputs).both),
        )
    return jnp.where(_distance(x) <= cut[:, None], x, NEVER)


class _CutOffs(NamedTuple):
    """The largest ``_distance`` that is kept, ``uint32[S]`` each; entries as far as that are all kept."""

    top_k: jax.Array
    both: jax.Array


def _cut_offs(x: jax.Array, mass: jax.Array, inputs: SamplingInputs) -> _CutOffs:
    """Of top-k, and of top-p among what that keeps. ``mass``: the sum of exp over the vocabulary."""
    limited_k, limited_p = inputs.top_k > 0, inputs.top_p < 1
    top_k = _largest_cut(x, jnp.ones_like, inputs.top_k.astype(jnp.float32), jnp.any(limited_k))
    top_k = jnp.where(limited_k, top_k, FARTHEST)
    kept_mass = jnp.where(_distance(x) <= top_k[:, None], jnp.exp(x), 0.0).sum(axis=-1)
    goal = jnp.minimum(inputs.top_p, 1 - 1e-6) * jnp.where(limited_k, kept_mass, mass)
    return _CutOffs(top_k, jnp.where(limited_p, _largest_cut(x, jnp.exp, goal, jnp.any(limited_p)), top_k))


def _largest_cut(
    x: jax.Array, weigh: Callable[[jax.Array], jax.Array], goal: jax.Array, wanted: jax.Array
) -> jax.Array:
    """The largest distance ``uint32[S]`` of which all that is nearer weighs less than ``goal``; 0 if not ``wanted``.

    The fewest nearest entries that weigh as much reach to there. It is found digit by digit, each in one pass over
    ``x`` that weighs what is nearer than each of its possible values. A GPU waits for memory: it takes digits of four
    bits and reads nothing but x. A CPU has it in its caches: it takes single bits, and weights made before.
    """

    def search(digit_bits: int, x: jax.Array, goal: jax.Array, wanted: jax.Array) -> jax.Array:
        stored = _distance(x), weigh(x)

        def find_digit(i: jax.Array, cut: jax.Array) -> jax.Array:
            shift = (32 - digit_bits * (1 + i)).astype(jnp.uint32)
            distance, weights = stored
            if digit_bits > 1:
                # The barrier keeps XLA from making them before the loop after all.
                y, cut = jax.lax.optimization_barrier((x, cut))
                distance, weights = _distance(y), weigh(y)
            digits = jnp.arange(1, 2**digit_bits, dtype=jnp.uint32)
            nearer = [jnp.where(distance < (cut + (digit << shift))[:, None], weights, 0.0) for digit in digits]
            num_less = sum((one < goal).astype(jnp.uint32) for one in _sums(nearer))
            return cut + (num_less << shift)

        num_digits = jnp.where(wanted, 32 // digit_bits, 0)
        return jax.lax.fori_loop(0, num_digits, find_digit, jnp.zeros(x.shape[0], jnp.uint32))

    return jax.lax.platform_dependent(x, goal, wanted, cpu=partial(search, 1), default=partial(search, 4))


def _sums(arrays: list[jax.Array]) -> Sequence[jax.Array]:
    """Of each row of each array, so that XLA reads what they are all made of once, and stores none of them.

    It fuses eight sums at most, so sums over a vocabulary are one reduction of many arrays. Over little it would rather
    store those.
    """
    if arrays[0].shape[1] <= SEARCH_BLOCK * SEARCH_BLOCKS:
        return [array.sum(axis=-1) for array in arrays]
    return jax.lax.reduce(arrays, [jnp.float32(0)] * len(arrays), partial(jax.tree.map, jnp.add), (1,))


def _distance(x: jax.Array) -> jax.Array:
    """Of entries that are at most 0, from 0: integers that sort like it, and tell apart what float32 does."""
    return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)


def token_logprobs(
    num_top: int, logits: jax.Array, tokens: jax.Array, wants_top: jax.Array | None = None
) -> TokenLogprobs[jax.Array]:
    """Of ``tokens`` ``[R]`` and the ``num_top`` likeliest under the unmodified distribution of ``logits``
    ``[R, vocab]``. Where the scalar ``wants_top`` is not set, zeros instead of the latter."""
    largest = logits.max(axis=-1, keepdims=True)
    norm = jnp.log(jnp.exp(logits - largest).sum(axis=-1, keepdims=True))

    def normed(some: jax.Array) -> jax.Array:
        # Relative to the largest first: logits far from zero would cost the difference its last digits.
        return some - largest - norm

    def find_top() -> tuple[jax.Array, jax.Array]:
        top, top_ids = jax.lax.top_k(logits, num_top)
        return normed(top), top_ids

    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = (logits > chosen).sum(axis=-1, dtype=jnp.int32) + 1
    top, top_ids = find_top() if wants_top is None else _optional(wants_top, find_top)
    return TokenLogprobs(normed(chosen)[:, 0], rank, top_ids, top)


def optional_logprobs(
    wanted: jax.Array, num_top: int, logits: jax.Array, tokens: jax.Array
) -> TokenLogprobs[jax.Array]:
    """``token_logprobs`` when the scalar ``wanted`` is set, zeros otherwise, decided on the device."""
    return _optional(wanted, partial(token_logprobs, num_top, logits, tokens))


def _optional[T](wanted: jax.Array, compute: Callable[[], T]) -> T:
    """What ``compute`` gives, or zeros of its shapes."""
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(wanted, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
