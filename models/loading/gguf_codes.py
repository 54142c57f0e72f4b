"""GGUF's simplest kinds as codes (ggml-common.h's blocks of 32 values). Others have scales of scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from jaxserve.models.loading.quantised.packing import PAIR_BITS
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

_FLOAT = np.dtype(np.float16)
_GROUP = 32


@dataclass(frozen=True)
class _Blocks:
    """How a kind's blocks begin: a scale, and a minimum where it has some; codes follow."""

    bits: int
    zero: int
    has_minima: bool
    codes: Callable[[np.ndarray], np.ndarray]
    """From the bytes that follow, ``uint8[..., n]``, to codes, or to pairs where they have 4 bits."""


def _paired(stored: np.ndarray) -> np.ndarray:
    """The low halves of 16 bytes are the first codes of a block, the high ones the others; two neighbours at a time."""
    both = stored.view("<u2")
    pairs = np.empty(stored.shape, np.uint8)
    pairs[..., :8] = both & 0x0F | both >> 4 & 0xF0
    pairs[..., 8:] = both >> 4 & 0x0F | both >> 8 & 0xF0
    return pairs


_KINDS = {
    Kind.Q4_0: _Blocks(4, 8, False, _paired),
    Kind.Q4_1: _Blocks(4, 0, True, _paired),
    Kind.Q8_0: _Blocks(8, 128, False, lambda stored: stored.view(np.int8)),
}
_CHUNK_BYTES = 1 << 18
"""What stays in the CPU's cache: over a whole tensor, the arrays in between cost twice the time."""


def encoding(shape: tuple[int, ...], kind: Kind) -> Encoding | None:
    """Of a matrix; None for other kinds."""
    blocks = _KINDS.get(kind)
    if blocks is None or len(shape) != 2:
        return None
    return Encoding((shape[0], shape[1]), blocks.bits, False, _FLOAT, _GROUP, blocks.zero, blocks.has_minima)


def quantised(rows: np.ndarray, kind: Kind) -> QuantisedTensor:
    """From the bytes of a matrix's rows, ``uint8[out, n]``."""
    blocks = _KINDS[kind]
    stored = rows.reshape(len(rows), -1, GGML_QUANT_SIZES[kind][1])
    first = 2 * _FLOAT.itemsize if blocks.has_minima else _FLOAT.itemsize
    floats = np.ascontiguousarray(stored[..., :first]).view(_FLOAT)
    is_paired = blocks.bits == PAIR_BITS
    codes = np.empty((*stored.shape[:2], stored.shape[2] - first), np.uint8 if is_paired else np.int8)
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    for begin in range(0, len(rows), step):
        chunk = slice(begin, begin + step)
        codes[chunk] = blocks.codes(np.ascontiguousarray(stored[chunk, :, first:]))
    zeros = np.full((1, 1), blocks.zero, np.uint8) if is_paired else None
    minima = floats[..., 1] if blocks.has_minima else None
    return QuantisedTensor(
        codes.reshape(len(rows), -1), floats[..., 0], zeros, _GROUP, minima=minima, is_paired=is_paired
    )
