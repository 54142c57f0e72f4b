"""Codes of 2 to 8 bits in 32-bit words."""

from __future__ import annotations

import math

import numpy as np

WORD_BITS = 32
PAIR_BITS = 4
"""Of a code of which a byte holds two."""


def num_words(num_codes: int, bits: int) -> int:
    """Words that hold so many codes, one after the other without gaps."""
    return -(-num_codes * bits // WORD_BITS)


def unpack(words: np.ndarray, bits: int, num_codes: int) -> np.ndarray:
    """The first codes of ``int32[..., words]``, as ``uint8[..., num_codes]``: the first in the lowest bits, without
    gaps, so that a code of 3 bits may begin in one word and end in the next.
    """
    codes_each, words_each = WORD_BITS // math.gcd(WORD_BITS, bits), bits // math.gcd(WORD_BITS, bits)
    missing = -words.shape[-1] % words_each
    if missing:
        words = np.concatenate([words, np.zeros((*words.shape[:-1], missing), words.dtype)], axis=-1)
    runs = words.view(np.uint32).reshape(*words.shape[:-1], -1, words_each)
    codes = np.empty((*runs.shape[:-1], codes_each), np.uint8)
    for place in range(codes_each):
        word, offset = divmod(place * bits, WORD_BITS)
        code = runs[..., word] >> offset
        if offset + bits > WORD_BITS:
            code |= runs[..., word + 1] << (WORD_BITS - offset)
        codes[..., place] = code & ((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :num_codes]


def pairs_of(words: np.ndarray, bits: int, num_codes: int) -> np.ndarray | None:
    """The codes of ``int32[..., words]`` as they lie, ``uint8[..., num_codes / 2]``: two to a byte, first the
    low half. None where they do not fill the words so."""
    fills = bits == PAIR_BITS and num_codes * bits == words.shape[-1] * WORD_BITS
    return np.ascontiguousarray(words).view(np.uint8) if fills else None


def pair(codes: np.ndarray) -> np.ndarray:
    """``uint8[..., n]`` of 4 bits -> ``[..., n / 2]``."""
    return codes[..., ::2] | codes[..., 1::2] << PAIR_BITS


def unpair(pairs: np.ndarray) -> np.ndarray:
    """``uint8[..., n]`` -> ``[..., 2 n]``."""
    return np.stack([pairs & 15, pairs >> PAIR_BITS], axis=-1).reshape(*pairs.shape[:-1], -1)
