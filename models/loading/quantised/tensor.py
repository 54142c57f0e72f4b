"""A quantised matrix, whatever the format of its file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from jaxserve.models.loading.quantised.packing import pairs_of, unpack, unpair

_CHUNK_VALUES = 1 << 17
_FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_VALUES = {dtype: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32) for dtype in _FLOAT8}
"""Of all codes: looking them up is several times as fast as the library's conversion."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """What a QuantisedTensor is going to be, before its codes are read; codes and zeros as ``unsigned`` has them."""

    shape: tuple[int, int]
    bits: int
    """Of a code at most."""
    is_float: bool
    scale_type: np.dtype
    group: int
    zero: int | None
    """None: zeros differ."""
    has_minima: bool = False
    order: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """``(codes - zeros) * scales + minima``, ``[out, in]``; a row's groups of inputs share scale, zero and minimum."""

    codes: np.ndarray
    """``uint8``, ``int8`` or a float of 8 bits, ``[out, in]``; or pairs, ``uint8[out, in / 2]``."""
    scales: np.ndarray
    """Floats ``[out, G]``."""
    zeros: np.ndarray | None
    """``uint8`` or ``int8`` ``[out, G]``, or ``[1, 1]`` where all are the same."""
    group: int
    """Inputs of a group; the last one may have fewer."""
    order: np.ndarray | None = None
    """``int32[in]``: the matrix's column ``order[c]`` is column c of ``codes``, so that groups are contiguous."""
    minima: np.ndarray | None = None
    """Floats ``[out, G]``."""
    is_paired: bool = False
    """Whether a byte of ``codes`` is two of 4 bits, the first in the low half."""

    @classmethod
    def of_words(cls, words: np.ndarray, encoding: Encoding, scales: np.ndarray, zeros: np.ndarray) -> QuantisedTensor:
        """From codes without gaps, ``int32[out, words]``, those of 4 bits as they lie."""
        (_, inputs), bits, order = encoding.shape, encoding.bits, encoding.order
        pairs = pairs_of(words, bits, inputs) if order is None else None
        codes = unpack(words, bits, inputs) if pairs is None else pairs
        codes = codes if order is None else codes[:, order]
        return cls(codes, scales, zeros, encoding.group, order, is_paired=pairs is not None)

    @property
    def num_inputs(self) -> int:
        return self.codes.shape[1] * (2 if self.is_paired else 1)

    def codes_of(self, rows: slice = slice(None)) -> np.ndarray:
        """Of some outputs, a byte each, ``[n, in]``."""
        codes = self.codes[rows]
        return unpair(codes) if self.is_paired else codes

    def unsigned(self) -> QuantisedTensor:
        """The same with integers, if it has such codes, as ``uint8``."""
        if self.codes.dtype != np.int8:
            return self
        zeros = np.zeros((1, 1), np.int8) if self.zeros is None else self.zeros
        # Adding 128, as flipping the sign's bit.
        codes, zeros = (signed.view(np.uint8) ^ np.uint8(128) for signed in (self.codes, zeros))
        return replace(self, codes=codes, zeros=zeros)

    def dequantised(self) -> np.ndarray:
        """The matrix, a new ``float32[out, in]``."""
        outputs, inputs = len(self.codes), self.num_inputs
        values = np.empty((outputs, inputs), np.float32)
        # In chunks that stay in the CPU's cache, as for GGUF.
        step = max(1, _CHUNK_VALUES // inputs)
        for first in range(0, outputs, step):
            rows = slice(first, first + step)
            chunk = values[rows] if self.order is None else np.empty_like(values[rows])
            self._dequantise(rows, chunk)
            if self.order is not None:
                values[rows, self.order] = chunk
        return values

    def _dequantise(self, rows: slice, values: np.ndarray) -> None:
        codes = self.codes_of(rows)
        if codes.dtype in _VALUES:
            np.take(_VALUES[codes.dtype], codes.view(np.uint8), out=values)
        else:
            values[:] = codes
        scales = self.scales[rows].astype(np.float32)
        zeros = None
        if self.zeros is not None:
            zeros = np.broadcast_to(self.zeros, self.scales.shape)[rows].astype(np.float32)
        whole = values.shape[1] // self.group
        for columns, numbers in (
            (slice(0, whole * self.group), slice(0, whole)),
            (slice(whole * self.group, None), slice(whole, None)),
        ):
            part = values[:, columns]
            if not part.size:
                continue
            grouped = part.reshape(len(part), scales[:, numbers].shape[1], -1)  # a view: it only splits an axis
            if zeros is not None:
                grouped -= zeros[:, numbers, None]
            grouped *= scales[:, numbers, None]
            if self.minima is not None:
                grouped += self.minima[rows, numbers, None].astype(np.float32)
