"""Rotary position embeddings and Hugging Face's ways of stretching them.

Formulas: RoPE (arXiv 2104.09864); linear (arXiv 2306.15595); dynamic NTK, yarn (arXiv 2309.00071); longrope
(arXiv 2402.13753); llama3 (Meta's reference code); proportional (Gemma 4). transformers' modeling_rope_utils fixes
their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig, Rope, Temperature

Frequencies = tuple[np.ndarray, float]
"""Inverse frequencies ``float32[dim / 2]`` and the factor that scales cos and sin."""


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(rope: Rope, trained: int, max_len: int) -> Frequencies:
    return _inverse_frequencies(rope.theta, rope.dim), 1.0


def _linear(rope: Rope, trained: int, max_len: int) -> Frequencies:
    return _inverse_frequencies(rope.theta, rope.dim) / rope.options["factor"], 1.0


def _dynamic(rope: Rope, trained: int, max_len: int) -> Frequencies:
    dim, factor = rope.dim, rope.options["factor"]
    length = max(max_len, trained)
    stretch = factor * length / trained - (factor - 1)
    return _inverse_frequencies(rope.theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def score_magnitude(rope: Rope) -> float:
    """What scores of queries and keys grow by where only a part of their dimensions is rotated, and cos and sin of yarn
    scale just that: both grow by the magnitude of ``mscale_all_dim``, as in DeepSeek-V2's code."""
    mscale = rope.options.get("mscale_all_dim")
    return _magnitude(rope.options.get("factor") or 1.0, mscale) ** 2 if mscale else 1.0


def _yarn(rope: Rope, trained: int, max_len: int) -> Frequencies:
    dim, theta, options = rope.dim, rope.theta, rope.options
    original = options["original_max_position_embeddings"]
    factor = options.get("factor") or trained / original

    scale = options.get("attention_factor")
    if scale is None:
        mscale, mscale_all = options.get("mscale"), options.get("mscale_all_dim")
        if mscale and mscale_all:
            scale = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
        else:
            scale = _magnitude(factor, 1.0)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(options.get("beta_fast") or 32), dimension_of(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    plain = _inverse_frequencies(theta, dim)
    return plain / factor * interpolated + plain * (1 - interpolated), float(scale)


def _longrope(rope: Rope, trained: int, max_len: int) -> Frequencies:
    options = rope.options
    original = options["original_max_position_embeddings"]
    factor = options.get("factor") or trained / original
    length = "long" if max_len > original else "short"
    scale = options.get(f"{length}_mscale") or options.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    stretch = np.asarray(options[f"{length}_factor"], np.float64)
    return _inverse_frequencies(rope.theta, rope.dim) / stretch, float(scale)


def _llama3(rope: Rope, trained: int, max_len: int) -> Frequencies:
    plain, options = _inverse_frequencies(rope.theta, rope.dim), rope.options
    factor, low, high = options["factor"], options["low_freq_factor"], options["high_freq_factor"]
    rotations = options["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain, 1.0


def _proportional(rope: Rope, trained: int, max_len: int) -> Frequencies:
    """The first ones of the whole head's, and 0 for the others: as if those dimensions did not rotate."""
    plain = _inverse_frequencies(rope.theta, rope.dim) / rope.options.get("factor", 1.0)
    rotated = int(rope.options.get("partial_rotary_factor", 1.0) * rope.dim // 2)
    return np.where(np.arange(len(plain)) < rotated, plain, 0.0), 1.0


_KINDS: dict[str, Callable[[Rope, int, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
ROPE_KINDS = tuple(_KINDS)


def rope_frequencies(rope: Rope, *, trained: int, max_len: int) -> Frequencies:
    """Inverse frequencies and cos/sin scale of ``rope`` in a model with ``trained`` max_position_embeddings.

    Kinds that depend on the sequence's length (dynamic, longrope) are fixed at ``max_len``, the longest sequence that
    will be served: keys are cached rotated, so a frequency that moved with the length would make the output depend on
    how the prompt was chunked. transformers gives the same for a sequence of ``max_len`` tokens.
    """
    if rope.kind not in _KINDS:
        raise ModelError(f"rope kind {rope.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    frequencies, scale = _KINDS[rope.kind](rope, trained, max_len)
    return frequencies.astype(np.float32), scale


def longest_sequence(config: ModelConfig) -> int:
    """Tokens that the model's positions reach, stretched or not; as vLLM derives its max_model_len."""
    rope, trained = config.rope, config.max_position_embeddings
    if rope is None or rope.kind in ("default", "llama3", "longrope", "proportional") or config.local_rope is not None:
        # Where only some layers are stretched (Gemma 3), max_position_embeddings is the stretched length.
        return trained
    if rope.kind == "yarn":
        original = rope.options["original_max_position_embeddings"]
        return int(original * (rope.options.get("factor") or trained / original))
    return int(trained * rope.options["factor"])


def rope_tables(frequencies: np.ndarray, scale: float, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``float32[T, dim / 2]`` for ``positions`` ``[T]``."""
    angles = positions[:, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def temperatures(temperature: Temperature, positions: jax.Array) -> jax.Array:
    """What queries at ``positions`` ``int32[T]`` grow by, ``float32[T]``."""
    steps = (positions + temperature.offset) // temperature.step_tokens
    return 1 + temperature.strength * jnp.log1p(steps.astype(jnp.float32))
