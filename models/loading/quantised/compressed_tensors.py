"""compressed-tensors, as llm-compressor writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.fields import LARGEST_SIZE, Fields
from jaxserve.models.loading.quantised.format import Tensors, column_order, expect, num_groups, refuse_excluded
from jaxserve.models.loading.quantised.packing import num_words, unpack
from jaxserve.models.loading.quantised.scaled import FLOAT8, PER_CHANNEL, PER_TENSOR, Blocks, blocks_of, by_row
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block")
_LINEAR = "Linear"
"""The class of all modules that are quantised here: what else is a matrix, embeddings, nobody quantises."""


@dataclass(frozen=True)
class Scheme:
    """How the modules of a group are quantised."""

    targets: tuple[str, ...]
    is_packed: bool
    bits: int
    is_float: bool
    symmetric: bool
    blocks: Blocks
    where: str

    @property
    def stored_bits(self) -> int:
        """Of a code: those that are not packed are a byte each."""
        return self.bits if self.is_packed else 8


@dataclass(frozen=True)
class CompressedTensors:
    """Packed ``weight_packed`` ``int32[out, in * bits / 32]`` or ``weight`` of int8 or float8, ``[out, in]``, with
    ``weight_scale`` and, where that is not symmetric, ``weight_zero_point``. Codes and zeros that are packed are both
    greater by half their range, which their difference does not show."""

    schemes: tuple[Scheme, ...]
    ignored: tuple[str, ...]
    where: str
    suffixes = frozenset({
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
        "input_scale", "input_zero_point", "output_scale", "output_zero_point",
    })  # fmt: skip

    def is_quantised(self, tensors: Tensors) -> bool:
        return "weight_packed" in tensors or ("weight" in tensors and tensors["weight"].dtype.name in ("int8", FLOAT8))

    def encoding(self, module: str, tensors: Tensors) -> Encoding:
        scheme = self._scheme_of(module)
        why = f" ({scheme.where})"
        if scheme.is_packed:
            outputs, inputs = _stored_shape(module, tensors)
            expect(module, tensors, "weight_packed", ["int32"], [outputs, num_words(inputs, scheme.bits)], why)
        else:
            kind = FLOAT8 if scheme.is_float else "int8"
            outputs, inputs = expect(module, tensors, "weight", [kind], [None, None], why).shape
        _, group = blocks_of(module, tensors, "weight_scale", (outputs, inputs), scheme.blocks)
        if scheme.is_packed and not scheme.symmetric:
            groups = num_groups(inputs, group)
            expect(module, tensors, "weight_zero_point", ["int32"], [num_words(outputs, scheme.bits), groups], why)
        elif not scheme.symmetric:
            expect(module, tensors, "weight_zero_point", ["int8"], tensors["weight_scale"].shape, why)
        if "weight_g_idx" in tensors:
            expect(module, tensors, "weight_g_idx", ["int32"], [inputs])
        order = column_order(f"{module}.weight_g_idx", tensors.get("weight_g_idx"), group)
        zero = 0 if scheme.is_float else 1 << (scheme.stored_bits - 1)
        return Encoding(
            (outputs, inputs), scheme.stored_bits, scheme.is_float, tensors["weight_scale"].dtype, group,
            zero if scheme.symmetric else None, order=order,
        )  # fmt: skip

    def decode(self, module: str, tensors: Tensors) -> QuantisedTensor:
        scheme, found = self._scheme_of(module), self.encoding(module, tensors)
        blocks = blocks_of(module, tensors, "weight_scale", found.shape, scheme.blocks)
        scales = by_row(tensors["weight_scale"], found.shape, blocks)
        if not scheme.is_packed:
            zeros = None if scheme.symmetric else by_row(tensors["weight_zero_point"], found.shape, blocks)
            return QuantisedTensor(tensors["weight"], scales, zeros, found.group)
        outputs, _ = found.shape
        if found.zero is not None:
            zeros = np.array([[found.zero]], np.uint8)
        else:
            zeros = unpack(tensors["weight_zero_point"].T, scheme.bits, outputs).T
        return QuantisedTensor.of_words(tensors["weight_packed"], found, scales, zeros)

    def _scheme_of(self, module: str) -> Scheme:
        if _matches(module, self.ignored):
            refuse_excluded(module, f"{self.where}ignore")
        by_name = (scheme for scheme in self.schemes if _matches(module, scheme.targets))
        by_class = (scheme for scheme in self.schemes if _LINEAR in scheme.targets)
        found = next(by_name, None) or next(by_class, None)
        if found is None:
            raise ModelError(
                f"{module} is quantised, but no targets of {self.where}config_groups are its name or {_LINEAR}"
            )
        return found

    def __str__(self) -> str:
        kinds = (f"{scheme.bits}-bit {'floats' if scheme.is_float else 'integers'}" for scheme in self.schemes)
        return f"compressed-tensors, {', '.join(kinds) or 'no weights'}"


def _matches(module: str, targets: Sequence[str]) -> bool:
    """As compressed-tensors has it: the whole name, or behind re: what it begins with."""
    return any(re.match(target[3:], module) if target.startswith("re:") else target == module for target in targets)


def _stored_shape(module: str, tensors: Tensors) -> tuple[int, int]:
    """Of a packed weight, whose last words may be filled in part."""
    outputs, inputs = sizes = expect(module, tensors, "weight_shape", ["int64", "int32"], [2]).tolist()
    if not all(0 < size <= LARGEST_SIZE for size in sizes):
        raise ModelError(f"{module}.weight_shape must be two sizes in [1, {LARGEST_SIZE}], found {sizes}")
    return outputs, inputs


def read(fields: Fields) -> CompressedTensors:
    """From a configuration of compressed-tensors. Raises ModelError."""
    sparsity = fields.fields("sparsity_config")
    if sparsity.values:
        sparsity.choice("format", ("dense",), "dense")
    if fields.fields("transform_config").fields("config_groups").values:
        raise fields.error("transform_config", "without config_groups, which rotate activations")
    groups = fields.fields("config_groups")
    schemes = [_read_scheme(groups.fields(name), fields) for name in groups.values]
    ignored = tuple(fields.texts("ignore") or ())
    _check_patterns(fields, "ignore")
    where = f"{fields.where}: {fields.prefix}"
    return CompressedTensors(tuple(scheme for scheme in schemes if scheme is not None), ignored, where)


def _read_scheme(group: Fields, whole: Fields) -> Scheme | None:
    """Of one of config_groups; None where it leaves weights as they are."""
    weights = group.fields("weights")
    if not weights.values:
        return None
    stored = (group if group.has("format") else whole).choice("format", _FORMATS)
    kind = weights.choice("type", ("int", "float"), "int")
    bits = weights.integer("num_bits", 8, low=2 if kind == "int" else 8, high=8)
    symmetric = weights.flag("symmetric", True)
    if kind == "float" and not symmetric:
        raise weights.error("symmetric", "true for floats")
    if kind == "float" and stored == _PACKED:
        raise weights.error("type", f"int for format {_PACKED}")
    _check_patterns(group, "targets")
    return Scheme(
        targets=tuple(group.texts("targets") or ()),
        is_packed=stored == _PACKED,
        bits=bits,
        is_float=kind == "float",
        symmetric=symmetric,
        blocks=_read_blocks(weights),
        where=f"{weights.where}: {weights.prefix}num_bits {bits}, type {kind}",
    )


def _read_blocks(weights: Fields) -> Blocks:
    size = weights.integer("group_size", -1, low=-1, high=LARGEST_SIZE)
    default = "tensor" if not weights.has("group_size") else ("channel" if size == -1 else "group")
    strategy = weights.choice("strategy", _STRATEGIES, default)
    if strategy == "group":
        return 1, weights.integer("group_size", high=LARGEST_SIZE)
    if strategy == "block":
        structure = weights.integers("block_structure") or []
        if len(structure) != 2 or not all(0 < size <= LARGEST_SIZE for size in structure):
            raise weights.error("block_structure", f"two integers in [1, {LARGEST_SIZE}]")
        return structure[0], structure[1]
    return PER_CHANNEL if strategy == "channel" else PER_TENSOR


def _check_patterns(fields: Fields, key: str) -> None:
    for target in fields.texts(key) or ():
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            if target.startswith("re:"):
                raise ModelError(f"{fields.where}: {fields.prefix}{key}: {target!r}: {error}") from error
