"""Rotary position embeddings and Hugging Face's ways of stretching them.

Formulas: RoPE (arXiv 2104.09864); linear (arXiv 2306.15595); dynamic NTK, yarn (arXiv 2309.00071); longrope
(arXiv 2402.13753); llama3 (Meta's reference code). transformers' modeling_rope_utils fixes their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import ModelConfig, ModelError

Frequencies = tuple[np.ndarray, float]
"""Inverse frequencies ``float32[head_dim / 2]`` and the factor that scales cos and sin."""


def _inverse_frequencies(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _linear(config: ModelConfig, options: dict[str, Any], max_len: int) -> Frequencies:
    return _inverse_frequencies(config.rope_theta, config.head_dim) / options["factor"], 1.0


def _dynamic(config: ModelConfig, options: dict[str, Any], max_len: int) -> Frequencies:
    dim, factor, trained = config.head_dim, options["factor"], config.max_position_embeddings
    length = max(max_len, trained)
    stretch = factor * length / trained - (factor - 1)
    return _inverse_frequencies(config.rope_theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(config: ModelConfig, options: dict[str, Any], max_len: int) -> Frequencies:
    dim, theta = config.head_dim, config.rope_theta
    trained = options["original_max_position_embeddings"]
    factor = options.get("factor") or config.max_position_embeddings / trained

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    scale = options.get("attention_factor")
    if scale is None:
        mscale, mscale_all = options.get("mscale"), options.get("mscale_all_dim")
        scale = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(options.get("beta_fast") or 32), dimension_of(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    plain = _inverse_frequencies(theta, dim)
    return plain / factor * interpolated + plain * (1 - interpolated), float(scale)


def _longrope(config: ModelConfig, options: dict[str, Any], max_len: int) -> Frequencies:
    trained = options["original_max_position_embeddings"]
    factor = options.get("factor") or config.max_position_embeddings / trained
    scale = options.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    stretch = np.asarray(options["long_factor" if max_len > trained else "short_factor"], np.float64)
    return _inverse_frequencies(config.rope_theta, config.head_dim) / stretch, float(scale)


def _llama3(config: ModelConfig, options: dict[str, Any], max_len: int) -> Frequencies:
    plain = _inverse_frequencies(config.rope_theta, config.head_dim)
    factor, low, high = options["factor"], options["low_freq_factor"], options["high_freq_factor"]
    rotations = options["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain, 1.0


_KINDS: dict[str, Callable[[ModelConfig, dict[str, Any], int], Frequencies]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
ROPE_KINDS = ("default", *_KINDS)


def rope_frequencies(config: ModelConfig, max_len: int) -> Frequencies:
    """Inverse frequencies and cos/sin scale of ``config``.

    Kinds that depend on the sequence's length (dynamic, longrope) are fixed at ``max_len``, the longest sequence that
    will be served: keys are cached rotated, so a frequency that moved with the length would make the output depend on
    how the prompt was chunked. transformers gives the same for a sequence of ``max_len`` tokens.
    """
    if config.rope_scaling is None:
        frequencies, scale = _inverse_frequencies(config.rope_theta, config.head_dim), 1.0
    else:
        kind = config.rope_scaling.kind
        if kind not in _KINDS:
            raise ModelError(f"rope_scaling kind {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        frequencies, scale = _KINDS[kind](config, config.rope_scaling.options, max_len)
    return frequencies.astype(np.float32), scale


def longest_sequence(config: ModelConfig) -> int:
    """Tokens that the model's rotary embeddings reach, stretched or not; as vLLM derives its max_model_len."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("llama3", "longrope"):
        return config.max_position_embeddings
    if scaling.kind == "yarn":
        trained = scaling.options["original_max_position_embeddings"]
        return int(trained * (scaling.options.get("factor") or config.max_position_embeddings / trained))
    return int(config.max_position_embeddings * scaling.options["factor"])


def rope_tables(frequencies: np.ndarray, scale: float, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``float32[T, 1, head_dim / 2]`` for ``positions`` ``[T]``."""
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate ``[T, heads, head_dim]`` in the two-halves layout of Hugging Face."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
