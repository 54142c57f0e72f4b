"""MXFP4 experts: 32 values of four bits share the exponent of a scale (OCP Microscaling formats, v1.0)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.fields import Fields
from jaxserve.models.loading.hf import FLOATS, SafetensorsSource
from jaxserve.models.loading.quantised.detect import METHOD_OF_EXPERTS as METHOD

_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_BY_CODE = np.concatenate((_VALUES, -_VALUES))
"""E2M1: a sign, two bits of exponent, one of mantissa."""
_SCALE_BIAS = 127
"""E8M0: an exponent alone."""
_GROUPS_AT_ONCE = 1 << 14
"""So that what stands between stays in the CPU's cache."""


def packs_experts(config: Fields) -> bool:
    """Whether a config.json says so. Raises ModelError."""
    return config.fields("quantization_config").text("quant_method") == METHOD


class Mxfp4Source(SafetensorsSource):
    """As files of bfloat16 would be: ``NAME_blocks`` and ``NAME_scales`` are one tensor, NAME, inputs first.

    Raises ModelError where one of the two is missing, or they do not fit each other.
    """

    def __init__(self, folder: Path, name_of: Callable[[str], str | None]) -> None:
        super().__init__(folder, name_of, [*FLOATS, "U8"])
        stored = super().names()
        self._packed = {name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)}
        for name in sorted(self._packed | {name.removesuffix(_SCALES) for name in stored if name.endswith(_SCALES)}):
            missing = sorted({name + _BLOCKS, name + _SCALES} - stored)
            if missing:
                raise ModelError(f"{folder}: missing {missing[0]}")
            blocks, scales = super().shape(name + _BLOCKS), super().shape(name + _SCALES)
            if blocks != (*scales, 16):
                raise ModelError(
                    f"{folder}: {name}{_BLOCKS} {blocks} must be of 16 bytes for each of its scales {scales}"
                )

    def names(self) -> set[str]:
        parts = {name + suffix for name in self._packed for suffix in (_BLOCKS, _SCALES)}
        return (super().names() - parts) | self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return super().shape(name)
        *lead, outputs, groups = super().shape(name + _SCALES)
        return (*lead, groups * 32, outputs)

    def read(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return super().read(name)
        return decode(super().read(name + _BLOCKS), super().read(name + _SCALES)).swapaxes(-1, -2)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """``uint8[..., groups, 16]``, the first of a byte's two values in its lower half, and ``uint8[..., groups]`` ->
    ``bfloat16[..., groups * 32]``, which holds them exactly."""
    packed, exponents = blocks.reshape(-1, 16), scales.reshape(-1).astype(np.int32) - _SCALE_BIAS
    values = np.empty((len(packed), 32), ml_dtypes.bfloat16)
    for first in range(0, len(packed), _GROUPS_AT_ONCE):
        some = slice(first, first + _GROUPS_AT_ONCE)
        codes = np.stack((packed[some] & 15, packed[some] >> 4), axis=-1).reshape(-1, 32)
        values[some] = np.ldexp(_BY_CODE[codes], exponents[some, None])
    return values.reshape(*scales.shape[:-1], -1)
