"""GGUF's most used kinds as codes (ggml-common.h's blocks). Others have codes that are no whole numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from jaxserve.models.loading.quantised.packing import PAIR_BITS
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

_HALF, _FLOAT = np.dtype(np.float16), np.dtype(np.float32)
_CHUNK_BYTES = 1 << 18
"""What stays in the CPU's cache: over a whole tensor, the arrays in between cost twice the time."""


@dataclass(frozen=True)
class _Kind:
    bits: int
    group: int
    zero: int
    has_minima: bool
    scale_type: np.dtype
    parts: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    """Of blocks ``uint8[rows, n, bytes]``: codes ``uint8[rows, n, ...]``, in pairs if they have 4 bits, scales, and
    minima where there are some, ``[rows, n, groups of a block]``."""


def _paired(stored: np.ndarray) -> np.ndarray:
    """The low halves of ``uint8[..., n]`` are n codes, the high ones those that follow; now two neighbours a byte."""
    both, first = stored.view("<u2"), stored.shape[-1] // 2
    pairs = np.empty(stored.shape, np.uint8)
    pairs[..., :first] = both & 0x0F | both >> 4 & 0xF0
    pairs[..., first:] = both >> 4 & 0x0F | both >> 8 & 0xF0
    return pairs


def _halves(blocks: np.ndarray, number: int) -> np.ndarray:
    """What blocks begin with, ``float16[rows, n, number]``."""
    return np.ascontiguousarray(blocks[..., : 2 * number]).view(_HALF)


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _paired(np.ascontiguousarray(blocks[..., 2:])), _halves(blocks, 1)


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    floats = _halves(blocks, 2)
    return _paired(np.ascontiguousarray(blocks[..., 4:])), floats[..., :1], floats[..., 1:]


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return blocks[..., 2:] ^ np.uint8(128), _halves(blocks, 1)  # adding 128, as flipping the sign's bit


def _scaled(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of Q4_K and Q5_K, ``float32[rows, n, 8]``: 6 bits each, of 12 bytes behind two float16."""
    of_scales, of_minima = (_halves(blocks, 2)[..., i : i + 1].astype(_FLOAT) for i in range(2))
    scales, minima, rest = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([scales & 0x3F, rest & 0x0F | scales >> 2 & 0x30], axis=-1)
    minima = np.concatenate([minima & 0x3F, rest >> 4 | minima >> 2 & 0x30], axis=-1)
    return of_scales * scales, -(of_minima * minima)


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return _paired(np.ascontiguousarray(blocks[..., 16:]).reshape(*blocks.shape[:2], 4, 32)), *_scaled(blocks)


def _q5_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    high, low = blocks[..., None, 16:48], blocks[..., 48:].reshape(*blocks.shape[:2], 4, 1, 32)
    low = (low >> np.array([[0], [4]], np.uint8) & 15).reshape(*blocks.shape[:2], 8, 32)
    return low | (high >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4, *_scaled(blocks)


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    shape = *blocks.shape[:2], 2, -1, 32
    low = blocks[..., :128].reshape(*shape[:3], 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    high = blocks[..., 128:192].reshape(*shape[:3], 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    of_scales = np.ascontiguousarray(blocks[..., 208:]).view(_HALF).astype(_FLOAT)
    return low.reshape(shape) | high << 4, of_scales * blocks[..., 192:208].view(np.int8)


_KINDS = {
    Kind.Q4_0: _Kind(4, 32, 8, False, _HALF, _q4_0),
    Kind.Q4_1: _Kind(4, 32, 0, True, _HALF, _q4_1),
    Kind.Q8_0: _Kind(8, 32, 128, False, _HALF, _q8_0),
    Kind.Q4_K: _Kind(4, 32, 0, True, _FLOAT, _q4_k),
    Kind.Q5_K: _Kind(5, 32, 0, True, _FLOAT, _q5_k),
    Kind.Q6_K: _Kind(6, 16, 32, False, _FLOAT, _q6_k),
}


def encoding(shape: tuple[int, ...], kind: Kind) -> Encoding | None:
    """Of a matrix; None for other kinds."""
    found = _KINDS.get(kind)
    if found is None or len(shape) != 2:
        return None
    return Encoding(
        (shape[0], shape[1]), found.bits, False, found.scale_type, found.group, found.zero, found.has_minima
    )


def quantised(rows: np.ndarray, kind: Kind) -> QuantisedTensor:
    """From the bytes of a matrix's rows, ``uint8[out, n]``."""
    found, (block, block_bytes) = _KINDS[kind], GGML_QUANT_SIZES[kind]
    blocks = rows.reshape(len(rows), -1, block_bytes)
    is_paired, inputs = found.bits == PAIR_BITS, blocks.shape[1] * block
    codes = np.empty((len(rows), inputs // 2 if is_paired else inputs), np.uint8)
    floats = np.empty((1 + found.has_minima, len(rows), inputs // found.group), found.scale_type)
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    for first in range(0, len(rows), step):
        chunk = slice(first, first + step)
        some, *scales = found.parts(blocks[chunk])
        codes[chunk] = some.reshape(len(some), -1)
        for values, one in zip(floats, scales, strict=True):
            values[chunk] = one.reshape(len(one), -1)
    zeros, minima = np.full((1, 1), found.zero, np.uint8), floats[1] if found.has_minima else None
    return QuantisedTensor(codes, floats[0], zeros, found.group, minima=minima, is_paired=is_paired)
