"""GGUF's simplest kinds as codes (ggml-common.h's blocks of 32 values). Others have scales of scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

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
    """From the bytes that follow, ``uint8[..., n]``, to ``[..., 32]``."""


def _halves(stored: np.ndarray) -> np.ndarray:
    """The low halves of 16 bytes, then the high ones."""
    return np.concatenate([stored & 15, stored >> 4], axis=-1)


_KINDS = {
    Kind.Q4_0: _Blocks(4, 8, False, _halves),
    Kind.Q4_1: _Blocks(4, 0, True, _halves),
    Kind.Q8_0: _Blocks(8, 128, False, lambda stored: stored.view(np.int8)),
}


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
    codes = blocks.codes(np.ascontiguousarray(stored[..., first:])).reshape(len(rows), -1)
    zeros = None if codes.dtype == np.int8 else np.full((1, 1), blocks.zero, np.uint8)
    minima = floats[..., 1] if blocks.has_minima else None
    return QuantisedTensor(codes, floats[..., 0], zeros, _GROUP, minima=minima)
