"""How a mixture's router chooses experts: from its logits ``float32[T, count]`` to the chosen experts' weights and
numbers, ``[T, per_token]`` each."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.models.config import Experts

Choice = tuple[jax.Array, jax.Array]


def _softmax(experts: Experts, logits: jax.Array, choice_bias: jax.Array | None) -> Choice:
    """The likeliest (arXiv 2401.04088), from the groups that have the likeliest (arXiv 2405.04434)."""
    weights, chosen = jax.lax.top_k(_of_best_groups(experts, jax.nn.softmax(logits), 1), experts.per_token)
    return _normalised(experts, weights), chosen


def _sigmoid(experts: Experts, logits: jax.Array, choice_bias: jax.Array | None) -> Choice:
    """The greatest logits, each with a weight of its own, as in Llama 4."""
    greatest, chosen = jax.lax.top_k(logits, experts.per_token)
    return _normalised(experts, jax.nn.sigmoid(greatest)), chosen


def _grouped_sigmoid(experts: Experts, logits: jax.Array, choice_bias: jax.Array | None) -> Choice:
    """From the groups whose best two experts are best together, by scores with a bias that balances the experts' load
    and is not in their weights (arXiv 2412.19437)."""
    scores = jax.nn.sigmoid(logits)
    biased = _of_best_groups(experts, scores if choice_bias is None else scores + choice_bias, 2)
    _, chosen = jax.lax.top_k(biased, experts.per_token)
    return _normalised(experts, jnp.take_along_axis(scores, chosen, axis=-1)), chosen


def _sparse_mixer(experts: Experts, logits: jax.Array, choice_bias: jax.Array | None) -> Choice:
    """The best, then the best of the others, each weighted against those that are as good but for the jitter
    (SparseMixer-v2, arXiv 2409.12136; Phi-3.5-MoE)."""
    left, weights, chosen = logits, [], []
    for _ in range(experts.per_token):
        best = left.max(axis=-1, keepdims=True)
        number = left.argmax(axis=-1, keepdims=True)
        is_far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * experts.jitter
        shares = jax.nn.softmax(jnp.where(is_far, -jnp.inf, left))
        weights.append(jnp.take_along_axis(shares, number, axis=-1))
        chosen.append(number)
        left = jnp.where(jnp.arange(experts.count) == number, -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1), jnp.concatenate(chosen, axis=-1)


def _of_best_groups(experts: Experts, scores: jax.Array, num_best: int) -> jax.Array:
    """The scores, but -inf outside of the groups whose ``num_best`` greatest have the greatest sum."""
    if experts.num_groups == 1:
        return scores
    groups = scores.reshape(len(scores), experts.num_groups, -1)
    sums = jax.lax.top_k(groups, min(num_best, groups.shape[-1]))[0].sum(axis=-1)
    _, kept = jax.lax.top_k(sums, experts.groups_per_token)
    is_kept = jax.nn.one_hot(kept, experts.num_groups, dtype=bool).any(axis=1)
    return jnp.where(is_kept[..., None], groups, -jnp.inf).reshape(scores.shape)


def _normalised(experts: Experts, weights: jax.Array) -> jax.Array:
    if experts.normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
    return weights * experts.scale


ROUTE: dict[str, Callable[[Experts, jax.Array, jax.Array | None], Choice]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "grouped_sigmoid": _grouped_sigmoid,
    "sparse_mixer": _sparse_mixer,
}
"""By config.ROUTERS' names."""
