"""What requests change of their logits before a token is drawn: which tokens are allowed, biases, penalties.

Order and definitions are vLLM's. Penalties of presence and frequency count output tokens, that of repetition (CTRL,
arXiv 1909.05858) the prompt's as well. Log-probabilities are of the logits as they were.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling_params import MAX_LOGIT_BIAS

BITS = 32


class LogitEdits[Array](NamedTuple):
    """Of R draws."""

    allowed: Array
    """``int32[R, ceil(vocab / 32)]``: a bit for each token, the lowest for the first."""
    bias_ids: Array
    """``int32[R, MAX_LOGIT_BIAS]``; -1 for none."""
    bias: Array
    """``float32[R, MAX_LOGIT_BIAS]``, added to the logits of these tokens."""
    penalties: Array
    """``float32[R, 3]``: of presence and frequency, 0 for none, and of repetition, 1 for none."""
    prompt_lengths: Array
    """``int32[R, 1]``"""


class EditLayout:
    """Where the edits of a draw lie in ``int32[width]``; floats lie there bit by bit."""

    def __init__(self, vocab_size: int) -> None:
        widths = (-(-vocab_size // BITS), MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, 3, 1)
        self._ends = np.cumsum(widths).tolist()
        self.width: int = self._ends[-1]

    def split[Array: (np.ndarray, jax.Array)](self, packed: Array) -> LogitEdits[Array]:
        """The fields of ``int32[R, width]``: views of a numpy array, static slices of a jax one."""
        starts = (0, *self._ends)
        allowed, bias_ids, bias, penalties, lengths = (
            packed[:, start:end] for start, end in zip(starts, self._ends, strict=False)
        )
        return LogitEdits(allowed, bias_ids, bias.view(np.float32), penalties.view(np.float32), lengths)

    def blank(self, num_draws: int) -> np.ndarray:
        """``int32[num_draws, width]``, which change nothing."""
        packed = np.zeros((num_draws, self.width), np.int32)
        edits = self.split(packed)
        edits.allowed.fill(-1)
        edits.bias_ids.fill(-1)
        edits.penalties[:, 2] = 1.0
        return packed


def edited(logits: jax.Array, edits: LogitEdits[jax.Array], history: jax.Array, positions: jax.Array) -> jax.Array:
    """``float32[R, vocab]`` with the edits. ``history``: ``int32[R, max_model_len]``, the draws' sequences, of which
    the tokens before ``positions`` ``int32[R]`` count."""
    num_draws, vocab_size = logits.shape
    bits = edits.allowed[:, :, None] >> jnp.arange(BITS, dtype=jnp.int32)
    is_allowed = (bits & 1).reshape(num_draws, -1)[:, :vocab_size] > 0
    logits = jnp.where(is_allowed, logits, -jnp.inf)
    # Scattering goes one by one on CPUs: not where nobody asks for it.
    logits = jax.lax.cond(jnp.any(edits.bias_ids >= 0), lambda: _biased(logits, edits), lambda: logits)
    neutral = jnp.array([0.0, 0.0, 1.0])
    # Counting goes through the whole history: not where nobody asks for it.
    wanted = jnp.any(edits.penalties != neutral)
    return jax.lax.cond(wanted, lambda: _penalised(logits, edits, history, positions), lambda: logits)


def _biased(logits: jax.Array, edits: LogitEdits[jax.Array]) -> jax.Array:
    rows = jnp.arange(logits.shape[0])[:, None]
    bias_ids = jnp.where(edits.bias_ids < 0, logits.shape[1], edits.bias_ids)
    return logits.at[rows, bias_ids].add(edits.bias, mode="drop")


def _penalised(logits: jax.Array, edits: LogitEdits[jax.Array], history: jax.Array, positions: jax.Array) -> jax.Array:
    num_draws, vocab_size = logits.shape
    place, rows = jnp.arange(history.shape[1]), jnp.arange(num_draws)[:, None]
    is_known = place < positions[:, None]
    is_output = is_known & (place >= edits.prompt_lengths)
    # Ids that do not exist are dropped.
    seen = jnp.zeros(logits.shape, bool).at[rows, jnp.where(is_known, history, vocab_size)].set(True, mode="drop")
    outputs = jnp.where(is_output, history, vocab_size)
    counts = jnp.zeros(logits.shape, jnp.float32).at[rows, outputs].add(1.0, mode="drop")
    presence, frequency, repetition = (edits.penalties[:, i, None] for i in range(3))
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    return logits - frequency * counts - presence * (counts > 0)
