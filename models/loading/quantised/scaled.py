"""Scales for a whole tensor, each row, each group of a row's inputs, or each block of rows and inputs."""

from __future__ import annotations

import numpy as np

from jaxserve.models.loading.quantised.format import SCALE_TYPES, Tensors, expect, num_groups

FLOAT8 = "float8_e4m3fn"

Blocks = tuple[int, int]
"""Outputs and inputs that share a scale; -1 is all of them."""
PER_TENSOR: Blocks = (-1, -1)
PER_CHANNEL: Blocks = (1, -1)


def blocks_of(
    module: str, tensors: Tensors, suffix: str, shape: tuple[int, int], blocks: Blocks | None
) -> tuple[int, int]:
    """Outputs and inputs of a weight ``shape`` that share one of the scales ``X.suffix``: ``blocks`` or, where that is
    None, whole rows or all, as there are scales. Raises ModelError where these do not fit.

    Sizes of 1 in their shape may be there or not.
    """
    scales = expect(module, tensors, suffix, SCALE_TYPES)
    if blocks is None:
        blocks = PER_TENSOR if scales.size == 1 else PER_CHANNEL
    rows, columns = (size if block == -1 else block for block, size in zip(blocks, shape, strict=True))
    wanted = num_groups(shape[0], rows), num_groups(shape[1], columns)
    if [size for size in scales.shape if size != 1] != [size for size in wanted if size != 1]:
        why = f" (one for {rows} by {columns} of {shape[0]} by {shape[1]} weights)"
        expect(module, tensors, suffix, SCALE_TYPES, wanted, why)
    return rows, columns


def by_row(values: np.ndarray, shape: tuple[int, int], blocks: tuple[int, int]) -> np.ndarray:
    """``[out, G]`` of scales, or of zeros that are laid out like them; ``blocks`` as blocks_of gives them."""
    rows, columns = blocks
    return np.repeat(values.reshape(-1, num_groups(shape[1], columns)), rows, axis=0)[: shape[0]]
