"""AWQ's tensors (arXiv 2306.00978) in AutoAWQ's gemm layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.models.fields import LARGEST_SIZE, Fields
from jaxserve.models.loading.quantised.format import SCALE_TYPES, Tensors, expect, num_groups
from jaxserve.models.loading.quantised.packing import unpack
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

_BITS, _CODES_EACH = 4, 8
_PLACES = np.array((0, 4, 1, 5, 2, 6, 3, 7))
"""Of a word's eight columns, which of its codes each is: awq/modules/linear/gemm.py packs them 0, 2, 4, 6, 1, 3, 5, 7,
so that a GPU's kernel unpacks them in pairs."""
_VERSIONS = ("gemm",)


@dataclass(frozen=True)
class AWQ:
    """``qweight`` ``int32[in, out / 8]``, ``qzeros`` ``int32[G, out / 8]``, ``scales`` ``[G, out]``.

    modules_to_not_convert is not read: modules that have no such tensors are not quantised.
    """

    group_size: int
    """-1: all inputs are one group."""
    suffixes = frozenset({"qweight", "qzeros", "scales"})

    def is_quantised(self, tensors: Tensors) -> bool:
        return "qweight" in tensors

    def encoding(self, module: str, tensors: Tensors) -> Encoding:
        inputs, words = expect(module, tensors, "qweight", ["int32"], [None, None]).shape
        group = self._group(inputs)
        groups, outputs, why = (
            num_groups(inputs, group),
            words * _CODES_EACH,
            f" ({inputs} inputs in groups of {group})",
        )
        expect(module, tensors, "qzeros", ["int32"], [groups, words], why)
        scales = expect(module, tensors, "scales", SCALE_TYPES, [groups, outputs], why)
        return Encoding((outputs, inputs), _BITS, False, scales.dtype, group, None)

    def decode(self, module: str, tensors: Tensors) -> QuantisedTensor:
        codes, zeros = (_columns(tensors[suffix]) for suffix in ("qweight", "qzeros"))
        return QuantisedTensor(codes, tensors["scales"].T, zeros, self._group(codes.shape[1]))

    def _group(self, inputs: int) -> int:
        return inputs if self.group_size == -1 else self.group_size

    def __str__(self) -> str:
        return f"awq, {_BITS} bits in groups of {self.group_size}"


def _columns(words: np.ndarray) -> np.ndarray:
    """``int32[n, out / 8]`` -> ``uint8[out, n]``."""
    stored = unpack(words, _BITS, words.shape[1] * _CODES_EACH).reshape(*words.shape, _CODES_EACH)
    return np.ascontiguousarray(stored[..., _PLACES].reshape(len(words), -1).T)


def read(fields: Fields) -> AWQ:
    """From AWQ's configuration, in config.json or, with other names, in quant_config.json. Raises ModelError."""
    bits, group_size = ("w_bit", "q_group_size") if fields.has("w_bit") else ("bits", "group_size")
    fields.integer(bits, low=_BITS, high=_BITS)
    fields.choice("version", _VERSIONS, "gemm")
    size = fields.integer(group_size, low=-1, high=LARGEST_SIZE)
    if size == 0:
        raise fields.error(group_size, "-1 or at least 1")
    return AWQ(size)
