"""Speculative decoding on the device: which draws hold, and what may come next.

A sequence's drafts lie in its history, behind its tokens. A step computes them in rows of their own and draws behind
each row. A draw depends on its seed and its position alone, so a draft that equals the draw before it is what would
have come without it, and so is the draw behind it: outputs are the same, token for token, at any temperature. For
drafts that nobody has drawn at random this is rejection sampling (arXiv 2211.17192), which accepts one with its
probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kernels.plan import AttentionPlan

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens of an n-gram."""
REJECTED, ABSENT = -1, -2
"""Instead of the tokens of draws behind drafts that do not hold, and behind rows that had no draft, or a probe."""


class SequenceState[Array](NamedTuple):
    """What the devices know of the sequences, by slot. A new owner begins it and sampling goes on with it."""

    history: Array
    """``int32[S, max_model_len]``: the tokens, sampled ones included, and the drafts of the next ones."""
    lengths: Array
    """``int32[S]``: how many tokens there are."""
    num_drafts: Array | None = None
    """``int32[S]``; None without speculation."""


class Proposal(NamedTuple):
    """Guesses of the tokens that follow each sequence's last one."""

    token_ids: jax.Array
    """``int32[S, K]``"""
    counts: jax.Array
    """``int32[S]``: how many of them there are, the first ones."""


class Draws(NamedTuple):
    """What a step draws, ``int32[R]`` each. The draws of a sequence follow each other."""

    slots: jax.Array
    """Of the sequences. Those that do not exist are of nobody, and of rows that had no draft."""
    offsets: jax.Array
    """How many drafts come before."""
    positions: jax.Array
    after: jax.Array
    """The token or the draft that it follows; a probe's is negative (ModelConfig.num_probes)."""
    tokens: jax.Array


Proposer = Callable[[SequenceState[jax.Array], int, Draws], Proposal]
"""Proposes up to so many tokens, from sequences that have no drafts, and what the last step has drawn."""


def ngrams(sequences: SequenceState[jax.Array], num_speculative_tokens: int) -> Proposal:
    """What followed the last tokens where they were seen before: of the longest match, the latest (prompt lookup).

    Where that reaches the end, the text has a period, and goes on with it.
    """
    history, lengths = sequences.history, sequences.lengths
    max_len = history.shape[1]
    place = jnp.arange(max_len)
    matching, num_matching = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
    for back in range(LONGEST_MATCH):
        last = jnp.take_along_axis(history, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
        matching &= (jnp.roll(history, back, axis=1) == last) & (place >= back)
        num_matching += matching
    is_earlier = place < lengths[:, None] - 1
    score = jnp.where(is_earlier & (num_matching >= SHORTEST_MATCH), num_matching * max_len + place, -1)
    best = score.max(axis=1)
    end = best % max_len + 1
    period = jnp.maximum(lengths - end, 1)
    source = end[:, None] + jnp.arange(num_speculative_tokens) % period[:, None]
    token_ids = jnp.take_along_axis(history, jnp.minimum(source, max_len - 1), axis=1)
    return Proposal(token_ids, jnp.where(best >= 0, num_speculative_tokens, 0))


def probed(sequences: SequenceState[jax.Array], most: int, draws: Draws) -> Proposal:
    """What was drawn behind probes, and as many probes again behind it, of each half of ``most`` (Hardware-Aware
    Parallel Prompt Decoding, arXiv 2405.18628).

    Probes follow the last draft. Where all drafts held, the first probe's draw is a guess of the token behind the one
    that came of it, the second probe's of the next, and so on. Where not, they have guessed what follows a mistake.
    """
    num_slots = len(sequences.lengths)
    ahead, is_probed = draws.positions - sequences.lengths[draws.slots], draws.after < 0
    all_held = jnp.zeros(num_slots, bool).at[jnp.where(ahead == 0, draws.slots, num_slots)].set(is_probed, mode="drop")
    owners = jnp.where(is_probed & (ahead >= 0), draws.slots, num_slots)
    guesses = jnp.zeros((num_slots, most), jnp.int32).at[owners, ahead].set(draws.tokens, mode="drop")
    number = jnp.where(all_held, jnp.zeros(num_slots, jnp.int32).at[owners].add(1, mode="drop"), 0)
    behind = jnp.arange(most) - number[:, None]
    return Proposal(jnp.where(behind < 0, guesses, -1 - behind), jnp.minimum(number + most // 2, most))


PROPOSERS: dict[str, Proposer] = {"ngram": lambda sequences, most, _: ngrams(sequences, most), "ppd": probed}
"""By the option ``speculative``."""


def draw_places(draw_positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each draw how many drafts come before it, and its position. ``int32[R]``: as the step has them; the lengths of
    their sequences."""
    offsets = jnp.where(draw_positions < 0, -1 - draw_positions, 0)
    return offsets, jnp.where(draw_positions < 0, lengths + offsets, draw_positions)


def verify(sequences: SequenceState[jax.Array], draws: Draws) -> tuple[SequenceState[jax.Array], jax.Array]:
    """The sequences with the draws that hold, those that draw without drafts; the draws' tokens, with REJECTED and
    ABSENT for the others. Sequences that do not draw keep their drafts: in a pipeline rows for these may be on their
    way.
    """
    history, lengths, num_drafts = sequences
    slots, offsets, positions, after, tokens = draws
    assert num_drafts is not None
    num_slots, max_len = history.shape
    numbers = num_drafts.at[slots].get(mode="fill", fill_value=0)
    misses = (tokens != history.at[slots, positions].get(mode="fill", fill_value=-1)) | (offsets >= numbers)
    misses_before = jnp.cumsum(misses) - misses
    holds = misses_before == misses_before[jnp.arange(len(slots)) - offsets]
    owners = jnp.where(holds, slots, num_slots)
    history = history.at[owners, positions].set(tokens, mode="drop")
    # A sequence that is as long as it may be has ended; what a step in flight draws behind it is nobody's.
    lengths = jnp.minimum(lengths.at[owners].add(1, mode="drop"), max_len)
    known = SequenceState(history, lengths, num_drafts.at[slots].set(0, mode="drop"))
    is_rejected = (offsets <= numbers) & (after >= 0)
    return known, jnp.where(holds, tokens, jnp.where(is_rejected, REJECTED, ABSENT))


def with_drafts(sequences: SequenceState[jax.Array], proposal: Proposal, of: jax.Array) -> SequenceState[jax.Array]:
    """The sequences, of which those ``of`` ``bool[S]`` have these drafts, as far as ``max_model_len`` reaches."""
    history, lengths, num_drafts = sequences
    assert num_drafts is not None
    num_slots, max_len = history.shape
    number = jnp.arange(proposal.token_ids.shape[1])
    is_draft = of[:, None] & (number < proposal.counts[:, None])
    places = jnp.where(is_draft, lengths[:, None] + number, max_len)
    history = history.at[jnp.arange(num_slots)[:, None], places].set(proposal.token_ids, mode="drop")
    return SequenceState(history, lengths, jnp.where(of, jnp.minimum(proposal.counts, max_len - lengths), num_drafts))


class Suggestions[Array](NamedTuple):
    """The host's, of N tokens at most for each sequence; see Suggestion of jaxserve/drafting.py."""

    starts: Array
    """``int32[S, 1]``: the first one's position; -1 for sequences that keep the drafts they have."""
    counts: Array
    """``int32[S, 1]``"""
    token_ids: Array
    """``int32[S, N]``"""


def suggestions_of[Array: (np.ndarray, jax.Array)](packed: Array) -> Suggestions[Array]:
    """Those in ``int32[S, 2 + N]``: views of a numpy array, static slices of a jax one."""
    return Suggestions(packed[:, :1], packed[:, 1:2], packed[:, 2:])


def most_suggested(num_speculative_tokens: int) -> int:
    """Tokens that are of use to a sequence: those of the step before, which the host has yet to read, and the next
    drafts."""
    return 2 * num_speculative_tokens + 1


def no_suggestions(num_seqs: int, num_speculative_tokens: int) -> np.ndarray:
    """``int32[S, 2 + N]``: to nobody, yet."""
    packed = np.zeros((num_seqs, 2 + most_suggested(num_speculative_tokens)), np.int32)
    packed[:, 0] = -1
    return packed


def suggested(
    num_speculative_tokens: int, sequences: SequenceState[jax.Array], packed: jax.Array
) -> SequenceState[jax.Array]:
    """The sequences, of which some have as drafts what is left of the host's suggestions, ``int32[S, 2 + N]``: none
    where the tokens that have come since are others."""
    history, lengths, _ = sequences
    starts, counts, token_ids = suggestions_of(packed)
    number = jnp.arange(token_ids.shape[1])
    places = jnp.clip(starts + number, 0, history.shape[1] - 1)
    num_since = lengths[:, None] - starts
    fits = (jnp.take_along_axis(history, places, axis=1) == token_ids) | (number >= num_since)
    behind = jnp.clip(num_since + jnp.arange(num_speculative_tokens), 0, token_ids.shape[1] - 1)
    left = jnp.where(fits.all(axis=1), jnp.clip(counts - num_since, 0, num_speculative_tokens)[:, 0], 0)
    return with_drafts(sequences, Proposal(jnp.take_along_axis(token_ids, behind, axis=1), left), starts[:, 0] >= 0)


def moved(plan: AttentionPlan[jax.Array], kv_lens: jax.Array) -> AttentionPlan[jax.Array]:
    """A plan that was made for rows as far as they may be, for rows that see ``kv_lens`` ``int32[T]`` keys."""
    found = kv_lens[plan.decode[:, 1]]
    return plan._replace(decode=plan.decode.at[:, 3].set(found - 1).at[:, 6].set(found))
