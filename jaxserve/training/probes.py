"""Probes for one model: trained embeddings behind a sequence, whose outputs guess what comes later.

Hardware-Aware Parallel Prompt Decoding (arXiv 2405.18628) calls them prompt tokens, and teaches them by distillation:
the d-th probe behind a token shall say what the model says once the d tokens between are known. Tokens never see
probes, so a text is read once, without gradients, and its keys serve probes behind many of its tokens, the anchors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxserve.models.decoder import Decoder
from jaxserve.models.matrix import Parameter
from jaxserve.training.dense import DenseModel, dense_inputs

DEPTH_WEIGHT = 0.8
"""Of the loss at a depth, by that of the one before."""
TOPS = (1, 3, 10)
"""How many of a probe's likeliest tokens are looked at, for accuracies."""


class Text(NamedTuple):
    """What probes are trained on."""

    token_ids: list[int]
    begin: int
    """The first token that may be an anchor: the model's own, if it has written the text."""


class Guesses(NamedTuple):
    """Of the probes behind some anchors, by depth."""

    loss: jax.Array
    """``float32[m]``: the divergence (KL) of what probes say from what the model says, the mean over the anchors."""
    ranks: jax.Array
    """``int32[anchors, m]``: of the model's likeliest token among the probe's, 0 where both agree."""


class ProbeTrainer:
    """Trains as many probes as the model's configuration has."""

    def __init__(
        self, model: DenseModel, *, num_anchors: int, num_steps: int, learning_rate: float = 0.01, seed: int = 0
    ) -> None:
        """``num_anchors``: of a text, in a step. ``num_steps``: over which the rate falls to nothing (cosine)."""
        self._model, self._num_anchors, self._random = model, num_anchors, np.random.default_rng(seed)
        self._optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=0.0)
        self.probes = _untrained(model, seed)
        """``float32[m, hidden]``"""
        self._state = self._optimizer.init(self.probes)
        self._guess = jax.jit(partial(guess, model))
        self._gradient = jax.jit(jax.value_and_grad(partial(_loss, model)))

    def step(self, texts: Sequence[Text]) -> float:
        """One of the optimizer's, by the mean over texts of one length; the loss before it."""
        found = [self._gradient(self.probes, self._model.parameters, *self._rows(text, self._random)) for text in texts]
        losses, gradients = zip(*found, strict=True)
        gradient = jnp.mean(jnp.stack(gradients), axis=0)
        updates, self._state = self._optimizer.update(gradient, self._state, self.probes)
        self.probes = self.probes + updates
        return float(np.mean(losses))

    def accuracy(self, texts: Sequence[Text]) -> dict[int, list[float]]:
        """By depth, for each of TOPS, how often the model's likeliest token is among so many of the probe's. Anchors
        are the same in every call."""
        random = np.random.default_rng(0)
        found = [self._guess(self.probes, self._model.parameters, *self._rows(text, random)) for text in texts]
        ranks = np.concatenate([np.asarray(guesses.ranks) for guesses in found])
        return {depth: [float((column < top).mean()) for top in TOPS] for depth, column in enumerate(ranks.T, 1)}

    def _rows(self, text: Text, random: np.random.Generator) -> tuple[jax.Array, jax.Array]:
        """``int32[n]``, ``int32[anchors]``: the tokens, and the places of some of them."""
        last = len(text.token_ids) - len(self.probes)
        anchors = random.choice(np.arange(text.begin, last), self._num_anchors, replace=False)
        return jnp.asarray(text.token_ids, jnp.int32), jnp.asarray(np.sort(anchors), jnp.int32)


def batches(texts: Sequence[Text], size: int, epochs: int, seed: int = 0) -> Iterator[list[Text]]:
    """All texts in every epoch, each time in another order, what does not fill a batch left out."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        order = random.permutation(len(texts))
        for begin in range(0, len(texts) - size + 1, size):
            yield [texts[index] for index in order[begin : begin + size]]


def guess(
    model: DenseModel,
    probes: jax.Array,
    parameters: dict[str, Parameter],
    token_ids: jax.Array,
    anchors: jax.Array,
) -> Guesses:
    """``int32[n]``, ``int32[A]``: a text, and the tokens of it that probes follow."""
    (length,), number = token_ids.shape, len(probes)
    decoder, depths = model.bind(parameters, probes), jnp.arange(number)
    probe_positions = (anchors[:, None] + 1 + depths).reshape(-1)
    place_positions = jnp.concatenate((jnp.arange(length), probe_positions))
    is_token, owner = jnp.arange(len(place_positions)) < length, jnp.repeat(jnp.arange(len(anchors)), number)

    positions = jnp.arange(length)
    visible = is_token & (place_positions <= positions[:, None])
    inputs = dense_inputs(positions, visible, positions, place_positions)
    hidden, cache = decoder(token_ids, positions, None, model.new_cache(len(place_positions)), inputs)
    # Row a + d knows the d tokens behind an anchor.
    said = jax.nn.log_softmax(decoder.logits(hidden[probe_positions]))

    owners = jnp.concatenate((jnp.full(length, -1), owner))
    is_own = (owners == owner[:, None]) & (place_positions <= probe_positions[:, None])
    is_before = is_token & (place_positions <= anchors[owner][:, None])
    inputs = dense_inputs(
        length + jnp.arange(len(probe_positions)), is_own | is_before, probe_positions, place_positions
    )
    hidden, _ = decoder(jnp.tile(-1 - depths, len(anchors)), probe_positions, None, cache, inputs)
    guessed = jax.nn.log_softmax(decoder.logits(hidden))

    divergences = jnp.sum(jnp.exp(said) * (said - guessed), axis=-1).reshape(-1, number)
    likeliest = jnp.take_along_axis(guessed, said.argmax(axis=-1)[:, None], axis=-1)
    ranks = jnp.sum(guessed > likeliest, axis=-1).reshape(-1, number)
    return Guesses(divergences.mean(axis=0), ranks)


def _loss(
    model: DenseModel,
    probes: jax.Array,
    parameters: dict[str, Parameter],
    token_ids: jax.Array,
    anchors: jax.Array,
) -> jax.Array:
    weights = DEPTH_WEIGHT ** jnp.arange(len(probes))
    return jnp.sum(weights * guess(model, probes, parameters, token_ids, anchors).loss) / weights.sum()


def _untrained(model: DenseModel, seed: int) -> jax.Array:
    """As tokens are in the mean, and a little apart."""
    shape = model.config.num_probes, model.config.hidden_size
    decoder: Decoder = model.bind(model.parameters, jnp.zeros(shape))
    ids = jnp.arange(model.config.vocab_size)
    embeddings = decoder.embed(ids, jnp.zeros_like(ids)).astype(jnp.float32)
    noise = jax.random.normal(jax.random.key(seed), shape)
    return embeddings.mean(axis=0) + 0.1 * embeddings.std(axis=0) * noise
