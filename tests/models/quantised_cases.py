"""Matrices quantised at random, as each format stores them, and what they are, worked out one code at a time.

The encoders begin with the codes, so ``truth`` needs no rounding: ``(code - zero) * scale`` in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]
FLOAT8 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True)
class Drawn:
    """A matrix ``[out, in]`` before it is encoded."""

    codes: np.ndarray
    """Integers, or floats of 8 bits."""
    zeros: np.ndarray
    """``int[out, G]``"""
    scales: np.ndarray
    """``[out, G]``"""
    groups: np.ndarray
    """``int[in]``, each input's."""

    @property
    def truth(self) -> np.ndarray:
        """One code after the other, in float64, then rounded to float32 once."""
        outputs, inputs = self.codes.shape
        values = np.empty((outputs, inputs), np.float64)
        for o in range(outputs):
            for i in range(inputs):
                group = int(self.groups[i])
                values[o, i] = (float(self.codes[o, i]) - float(self.zeros[o, group])) * float(self.scales[o, group])
        return values.astype(np.float32)


def draw(
    shape: tuple[int, int], bits: int, group: int, *, symmetric: bool, act_order: bool = False,
    scale_type: Any = np.float16, seed: int = 0,
) -> Drawn:  # fmt: skip
    """All codes, and weights of about 0.3; ``group`` -1 is a whole row. Zeros of symmetric ones are half the range."""
    random = np.random.default_rng(seed)
    outputs, inputs = shape
    group = inputs if group == -1 else group
    groups = np.arange(inputs) // group
    if act_order:
        random.shuffle(groups)
    num_groups, half = -(-inputs // group), 1 << (bits - 1)
    scales = random.uniform(0.5, 1.5, (outputs, num_groups)) * (0.5 / half)
    zeros = np.full(scales.shape, half) if symmetric else random.integers(0, 1 << bits, scales.shape)
    return Drawn(random.integers(0, 1 << bits, shape), zeros, scales.astype(scale_type), groups)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row of ``int[n, k]`` as a number of k digits, the first the lowest, in words: ``int32[n, words]``."""
    num_words = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    data = b"".join(row.to_bytes(4 * num_words, "little") for row in rows)
    return np.frombuffer(data, np.int32).reshape(len(codes), num_words)


def unpack_one_by_one(words: np.ndarray, bits: int, num_codes: int) -> np.ndarray:
    """What ``pack`` was given."""
    rows = [int.from_bytes(np.ascontiguousarray(row).tobytes(), "little") for row in words]
    return np.array([[(row >> (bits * i)) & ((1 << bits) - 1) for i in range(num_codes)] for row in rows])


def gptq(drawn: Drawn, bits: int, *, from_one: bool = True) -> Tensors:
    zeros = (drawn.zeros.T - 1) % (1 << bits) if from_one else drawn.zeros.T
    return {
        "qweight": np.ascontiguousarray(pack(drawn.codes, bits).T),
        "qzeros": pack(zeros, bits),
        "scales": np.ascontiguousarray(drawn.scales.T),
        "g_idx": drawn.groups.astype(np.int32),
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(drawn: Drawn) -> Tensors:
    def mixed(values: np.ndarray) -> np.ndarray:
        return values[:, [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(values.shape[1])]]

    scales = np.ascontiguousarray(drawn.scales.T)
    return {"qweight": pack(mixed(drawn.codes.T), 4), "qzeros": pack(mixed(drawn.zeros.T), 4), "scales": scales}


def packed(drawn: Drawn, bits: int, *, symmetric: bool, act_order: bool = False) -> Tensors:
    """compressed-tensors' pack-quantized."""
    tensors = {
        "weight_packed": pack(drawn.codes, bits),
        "weight_scale": drawn.scales,
        "weight_shape": np.array(drawn.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(drawn.zeros.T, bits).T)
    return tensors | ({"weight_g_idx": drawn.groups.astype(np.int32)} if act_order else {})


def int8(shape: tuple[int, int], group: int = -1, *, symmetric: bool = True, seed: int = 0) -> tuple[Drawn, Tensors]:
    drawn = draw(shape, 8, group, symmetric=symmetric, scale_type=np.float32, seed=seed)
    drawn = replace(drawn, codes=drawn.codes - 128, zeros=drawn.zeros - 128)
    tensors = {"weight": drawn.codes.astype(np.int8), "weight_scale": drawn.scales}
    return drawn, tensors if symmetric else tensors | {"weight_zero_point": drawn.zeros.astype(np.int8)}


def float8(
    shape: tuple[int, int], block: tuple[int, int], name: str, scale_shape: tuple[int, ...], seed: int = 0,
    scale_type: Any = np.float32,
) -> tuple[Drawn, Tensors]:  # fmt: skip
    """A scale for each block of outputs and inputs, stored in ``scale_shape``."""
    random = np.random.default_rng(seed)
    (outputs, inputs), (rows, columns) = shape, block
    codes = random.normal(size=shape).astype(FLOAT8)
    grid = (random.uniform(0.1, 0.5, (-(-outputs // rows), -(-inputs // columns)))).astype(scale_type)
    scales = np.stack([grid[o // rows] for o in range(outputs)])
    drawn = Drawn(codes, np.zeros(scales.shape, int), scales, np.arange(inputs) // columns)
    return drawn, {"weight": codes, name: grid.reshape(scale_shape)}


@dataclass(frozen=True)
class Case:
    """A format, and how it stores a matrix of any shape."""

    config: dict[str, Any]
    """quantization_config"""
    encode: Callable[[tuple[int, int], int], tuple[Drawn, Tensors]]
    """Of a shape and a seed."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Tensors of a module that nobody needs."""


def _gptq(bits: int, group: int, *, symmetric: bool, act_order: bool = False, from_one: bool = True) -> Case:
    def encode(shape: tuple[int, int], seed: int) -> tuple[Drawn, Tensors]:
        drawn = draw(shape, bits, group, symmetric=symmetric, act_order=act_order, seed=seed)
        return drawn, gptq(drawn, bits, from_one=from_one)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
    config["lm_head"] = True
    return Case(config | {"checkpoint_format": "gptq" if from_one else "gptq_v2"}, encode)


def _auto_round() -> Case:
    def encode(shape: tuple[int, int], seed: int) -> tuple[Drawn, Tensors]:
        drawn = draw(shape, 4, 8, symmetric=False, seed=seed)
        tensors = gptq(drawn, 4)
        del tensors["g_idx"]
        return drawn, tensors

    config = {"quant_method": "auto-round", "bits": 4, "group_size": 8, "sym": False}
    return Case(config | {"packing_format": "auto_round:auto_gptq"}, encode)


def _awq(group: int) -> Case:
    def encode(shape: tuple[int, int], seed: int) -> tuple[Drawn, Tensors]:
        drawn = draw(shape, 4, group, symmetric=False, seed=seed)
        return drawn, awq(drawn)

    return Case({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, encode)


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    base = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return base | {"config_groups": {"group_0": group}} | more


def _packed(bits: int, group: int, *, symmetric: bool, act_order: bool = False, scale_type: Any = np.float16) -> Case:
    def encode(shape: tuple[int, int], seed: int) -> tuple[Drawn, Tensors]:
        drawn = draw(shape, bits, group, symmetric=symmetric, act_order=act_order, scale_type=scale_type, seed=seed)
        return drawn, packed(drawn, bits, symmetric=symmetric, act_order=act_order)

    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return Case(compressed("pack-quantized", weights | ({"actorder": "group"} if act_order else {})), encode)


def _int8(group: int, *, symmetric: bool) -> Case:
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    config = compressed("int-quantized", weights)
    return Case(config, lambda shape, seed: int8(shape, group, symmetric=symmetric, seed=seed))


def _float8(config: dict[str, Any], block: tuple[int, int] | str, name: str, **extras: np.ndarray) -> Case:
    def encode(shape: tuple[int, int], seed: int) -> tuple[Drawn, Tensors]:
        blocks = {"tensor": shape, "channel": (1, shape[1])}
        rows, columns = blocks[block] if isinstance(block, str) else block
        grid = -(-shape[0] // rows), -(-shape[1] // columns)
        stored = {"tensor": (), "channel": (shape[0], 1)}[block] if isinstance(block, str) else grid
        return float8(shape, (rows, columns), name, stored, seed)

    return Case(config, encode, extras)


FP8_WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}
ONE = np.ones((), np.float32)
CASES = {
    "gptq 2 bits": _gptq(2, 8, symmetric=False),
    "gptq 3 bits": _gptq(3, 16, symmetric=False),
    "gptq 3 bits v2": _gptq(3, 16, symmetric=False, from_one=False),
    "gptq 4 bits": _gptq(4, 16, symmetric=False),
    "gptq 4 bits v2": _gptq(4, 16, symmetric=False, from_one=False),
    "gptq 4 bits, act-order": _gptq(4, 8, symmetric=False, act_order=True),
    "gptq 4 bits, symmetric act-order": _gptq(4, 8, symmetric=True, act_order=True),
    "gptq 8 bits, whole rows": _gptq(8, -1, symmetric=True),
    "auto-round": _auto_round(),
    "awq": _awq(16),
    "awq, whole rows": _awq(-1),
    "packed 4 bits": _packed(4, 16, symmetric=True, scale_type=ml_dtypes.bfloat16),
    "packed 4 bits, zeros": _packed(4, 16, symmetric=False),
    "packed 4 bits, act-order": _packed(4, 8, symmetric=False, act_order=True),
    "packed 3 bits, rows": _packed(3, -1, symmetric=False),
    "packed 5 bits": _packed(5, 16, symmetric=True),
    "packed 8 bits": _packed(8, 8, symmetric=False, scale_type=np.float32),
    "int8": _int8(-1, symmetric=True),
    "int8, zeros": _int8(8, symmetric=False),
    "float8 of compressed-tensors": _float8(
        compressed("float-quantized", FP8_WEIGHTS | {"strategy": "channel"}), "channel", "weight_scale"
    ),
    "float8 blocks of compressed-tensors": _float8(
        compressed("float-quantized", FP8_WEIGHTS | {"strategy": "block", "block_structure": [16, 24]}),
        (16, 24), "weight_scale",
    ),
    "fp8": _float8(
        {"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "weight_scale", input_scale=ONE
    ),
    "fp8, rows": _float8({"quant_method": "fbgemm_fp8"}, "channel", "weight_scale", input_scale_ub=ONE),
    "fp8 blocks": _float8(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 24]},
        (16, 24), "weight_scale_inv",
    ),
    "modelopt": _float8(
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, "tensor", "weight_scale",
        input_scale=ONE,
    ),
}  # fmt: skip
