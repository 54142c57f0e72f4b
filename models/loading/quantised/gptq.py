"""GPTQ's tensors (arXiv 2210.17323), as AutoGPTQ, GPTQModel and auto-round write them.

Both count zeros from 1 in their first format: what is stored is one less, and a zero of 0 is stored as the largest
code. Of symmetric files neither's zeros are to be trusted, for some say v1 and hold v2's, so nobody reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.fields import LARGEST_SIZE, Fields
from jaxserve.models.loading.quantised.format import (
    SCALE_TYPES,
    Tensors,
    column_order,
    expect,
    num_groups,
    refuse_excluded,
)
from jaxserve.models.loading.quantised.packing import WORD_BITS, num_words, unpack
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_AUTO_ROUND_PACKING = ("auto_round:auto_gptq",)


@dataclass(frozen=True)
class Scheme:
    """How one module is quantised."""

    bits: int
    group_size: int
    """-1: all inputs are one group."""
    symmetric: bool

    def overridden(self, fields: Fields) -> Scheme:
        """With what ``fields`` says otherwise."""
        bits = fields.integer("bits", self.bits)
        if bits not in _BITS:
            raise fields.error("bits", f"one of {', '.join(map(str, _BITS))}")
        group_size = fields.integer("group_size", self.group_size, low=-1, high=LARGEST_SIZE)
        if group_size == 0:
            raise fields.error("group_size", "-1 or at least 1")
        return Scheme(bits, group_size, fields.flag("sym", self.symmetric))


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    scheme: Scheme | None
    """None: modules of such a name are not quantised."""
    where: str


@dataclass(frozen=True)
class GPTQ:
    """``qweight`` ``int32[in * bits / 32, out]``, ``qzeros`` ``int32[G, out * bits / 32]``, ``scales`` ``[G, out]`` and
    ``g_idx`` ``int32[in]``, each input's group: with activation order (desc_act) they are in no order."""

    scheme: Scheme
    zeros_from_one: bool
    needs_groups: bool
    """Whether g_idx must be there."""
    rules: tuple[_Rule, ...] = ()
    """The first that matches a module's name holds."""
    suffixes = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def is_quantised(self, tensors: Tensors) -> bool:
        return "qweight" in tensors

    def encoding(self, module: str, tensors: Tensors) -> Encoding:
        scheme = self._scheme_of(module)
        bits, why = scheme.bits, f" ({scheme.bits} bits)"
        words, outputs = expect(module, tensors, "qweight", ["int32"], [None, None]).shape
        inputs = words * WORD_BITS // bits
        if "g_idx" in tensors or (self.needs_groups and scheme.group_size != -1):
            inputs = len(expect(module, tensors, "g_idx", ["int32"], [None]))
        group = inputs if scheme.group_size == -1 else scheme.group_size
        groups, why = num_groups(inputs, group), f"{why}, {inputs} inputs in groups of {group}"
        expect(module, tensors, "qweight", ["int32"], [num_words(inputs, bits), outputs], why)
        scales = expect(module, tensors, "scales", SCALE_TYPES, [groups, outputs], why)
        if not scheme.symmetric:
            expect(module, tensors, "qzeros", ["int32"], [groups, num_words(outputs, bits)], why)
        order = column_order(f"{module}.g_idx", tensors.get("g_idx"), group)
        zero = 1 << (bits - 1) if scheme.symmetric else None
        return Encoding((outputs, inputs), bits, False, scales.dtype, group, zero, order=order)

    def decode(self, module: str, tensors: Tensors) -> QuantisedTensor:
        found = self.encoding(module, tensors)
        (outputs, _), bits = found.shape, found.bits
        words = np.ascontiguousarray(tensors["qweight"].T)
        if found.zero is not None:
            zeros = np.array([[found.zero]], np.uint8)
        else:
            zeros = unpack(tensors["qzeros"], bits, outputs).T
            if self.zeros_from_one:
                zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
        return QuantisedTensor.of_words(words, found, tensors["scales"].T, zeros)

    def _scheme_of(self, module: str) -> Scheme:
        for rule in self.rules:
            if rule.pattern.match(module):
                if rule.scheme is None:
                    refuse_excluded(module, rule.where)
                return rule.scheme
        return self.scheme

    def __str__(self) -> str:
        return f"gptq, {self.scheme.bits} bits in groups of {self.scheme.group_size}"


def read(fields: Fields) -> GPTQ:
    """From GPTQ's configuration. Raises ModelError."""
    if fields.flag("is_marlin_format"):
        raise fields.error("is_marlin_format", "false")
    key = "format" if fields.has("format") else "checkpoint_format"
    stored = fields.choice(key, _FORMATS, "gptq")
    fields.choice("pack_dtype", ("int32",), "int32")
    scheme = _scheme(fields)
    dynamic, rules = fields.fields("dynamic"), []
    for pattern in dynamic.values:
        sign, _, rest = pattern.partition(":")
        regex = _compiled(dynamic, pattern, rest if sign in ("+", "-") else pattern)
        found = None if sign == "-" else scheme.overridden(dynamic.fields(pattern))
        rules.append(_Rule(regex, found, f"{dynamic.where}: {dynamic.prefix}{pattern}"))
    return GPTQ(scheme, stored == "gptq", fields.flag("desc_act"), tuple(rules))


def read_auto_round(fields: Fields) -> GPTQ:
    """From auto-round's configuration of GPTQ's packing. Raises ModelError."""
    fields.choice("packing_format", _AUTO_ROUND_PACKING, _AUTO_ROUND_PACKING[0])
    fields.choice("data_type", ("int",), "int")
    scheme, extra, rules = _scheme(fields), fields.fields("extra_config"), []
    for name in extra.values:
        layer = extra.fields(name)
        # 16 bits and more is how it spells a module that is left as it is.
        is_left = layer.integer("bits", scheme.bits) >= 16
        found = None if is_left else scheme.overridden(layer)
        rules.append(_Rule(re.compile(rf"{re.escape(name)}\Z"), found, f"{extra.where}: {layer.prefix}bits"))
    return GPTQ(scheme, True, False, tuple(rules))


def _scheme(fields: Fields) -> Scheme:
    for key in ("bits", "group_size"):
        fields.integer(key, low=-1)
    return Scheme(4, -1, True).overridden(fields)


def _compiled(fields: Fields, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(f"{fields.where}: {fields.prefix}{key} is no regular expression: {error}") from error
