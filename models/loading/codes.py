"""From a checkpoint's quantised tensors to matrices in memory that are codes too."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models.loading.quantised.packing import PAIR_BITS, pair
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor
from jaxserve.models.matrix import MatrixLayout, QuantisedMatrix
from jaxserve.models.matrix.coded import Division
from jaxserve.models.weights import TensorSource, Weight


class CodeSource(TensorSource, Protocol):
    """A TensorSource of quantised tensors, which may be had as codes."""

    def encoding(self, name: str) -> Encoding | None:
        """Of a tensor; None where it is not quantised, or has no such codes."""
        ...

    def quantised(self, name: str) -> QuantisedTensor:
        """A tensor that has an encoding."""
        ...


class _Rows(NamedTuple):
    """Which rows of a tensor are where in a parameter."""

    name: str
    numbers: np.ndarray
    """Of the tensor's rows, one for each output in ``place``."""
    place: tuple[slice, ...]


def plan(
    source: CodeSource,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    weights: Mapping[str, Weight],
    layouts: Mapping[str, MatrixLayout],
) -> dict[str, QuantisedMatrix]:
    """Of the parameters those that can be codes, as they will be, without values; reads names and shapes only.

    Experts' are not among them, nor what mixes codes with floats, or has columns in orders of its own.
    """
    found = {name: _planned(source, abstract[name], weights[name], layout) for name, layout in layouts.items()}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def load(
    source: CodeSource, planned: Mapping[str, QuantisedMatrix], weights: Mapping[str, Weight]
) -> Iterator[tuple[str, QuantisedMatrix]]:
    """The matrices that ``plan`` has given, one after the other; the next are read meanwhile. Raises ModelError."""
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:  # numpy does most of it without Python's lock
        pending: deque[tuple[str, Future[QuantisedMatrix]]] = deque()
        for name, matrix in planned.items():
            pending.append((name, pool.submit(_assembled, source, matrix, weights[name])))
            if len(pending) > workers:
                first, future = pending.popleft()
                yield first, future.result()
        for name, future in pending:
            yield name, future.result()


def _planned(
    source: CodeSource, spec: jax.ShapeDtypeStruct, weight: Weight, layout: MatrixLayout
) -> QuantisedMatrix | None:
    encodings = [encoding for part in weight if (encoding := source.encoding(part.name)) is not None]
    count = layout.num_outputs
    if layout.is_grouped or len(encodings) < len(weight) or _rows(source, weight, count) is None:
        return None
    first, *rest = encodings
    if any(one.is_float != first.is_float or not _same(one.order, first.order) for one in rest):
        return None
    mesh, axes = spec.sharding.mesh, (*spec.sharding.spec, *[None] * len(spec.shape))[: len(spec.shape)]
    outputs, shared = axes[:count], axes[count]
    inputs, shares = math.prod(spec.shape[count:]), 1 if shared is None else mesh.shape[shared]
    if first.order is not None and shares > 1:
        return None  # a device's columns would be of everybody's inputs
    group = math.gcd(inputs // shares, *(one.group for one in encodings))
    bits = 4 if max(one.bits for one in encodings) <= 4 and group % 2 == 0 else 8
    zeros = {one.zero for one in encodings}
    zero = zeros.pop() if len(zeros) == 1 else None
    scale_types = {one.scale_type for one in encodings}
    scale_type = scale_types.pop() if len(scale_types) == 1 else np.dtype(np.float32)

    def array(width: int, dtype: np.dtype) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*outputs, shared))
        return jax.ShapeDtypeStruct((*spec.shape[:count], width), dtype, sharding=sharding)

    byte, groups = np.dtype(np.uint8), inputs // group
    order: Any = None
    if first.order is not None:
        order = jax.ShapeDtypeStruct((inputs,), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return QuantisedMatrix(
        codes=array(inputs * bits // 8, np.dtype(ml_dtypes.float8_e4m3fn) if first.is_float else byte),
        scales=array(groups, scale_type),
        zeros=array(groups, byte) if zero is None else None,
        minima=array(groups, scale_type) if any(one.has_minima for one in encodings) else None,
        order=order,
        layout=layout, bits=bits, group=group, zero=zero or 0, dtype=spec.dtype,
        division=Division(mesh, outputs, shared) if mesh.size > 1 else None,
    )  # fmt: skip


def _rows(source: CodeSource, weight: Weight, num_outputs: int) -> list[_Rows] | None:
    """Of each part; None where one does not take rows of its tensor whole and in their order.

    A part's view is shown the numbers of its tensor's rows, and of its columns, in place of values: stand-ins that take
    no memory.
    """
    found = []
    for part in weight:
        shape = source.shape(part.name)
        numbers = part.view(np.broadcast_to(np.arange(shape[0])[:, None], shape))
        columns = part.view(np.broadcast_to(np.arange(shape[1]), shape))
        place, outputs = part.place(numbers.shape), numbers.shape[:num_outputs]
        numbers, columns = numbers.reshape(*outputs, -1), columns.reshape(*outputs, -1)
        one_row = columns[(0,) * num_outputs]
        if not np.array_equal(one_row, np.arange(shape[1])) or not np.array_equal(numbers[..., 0], numbers[..., -1]):
            return None
        found.append(_Rows(part.name, numbers[..., 0], place[:num_outputs]))
    return found


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return np.array_equal(one, other) if one is not None and other is not None else one is other


def _assembled(source: CodeSource, abstract: QuantisedMatrix, weight: Weight) -> QuantisedMatrix:
    arrays = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), abstract)
    all_rows = _rows(source, weight, abstract.layout.num_outputs)
    assert all_rows is not None, "planned"
    # A tensor that has several places is read once.
    for name in dict.fromkeys(rows.name for rows in all_rows):
        tensor = source.quantised(name).unsigned()
        for rows in all_rows:
            if rows.name == name:
                numbers = rows.numbers
                in_order = np.array_equal(numbers.ravel(), np.arange(len(tensor.codes)))
                for array, values in _filled(arrays, tensor):
                    array[rows.place] = values.reshape(*numbers.shape, -1) if in_order else values[numbers]
        if tensor.order is not None:
            arrays = replace(arrays, order=tensor.order)
    return jax.tree.map(
        lambda array, spec: jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: array[index]),
        arrays, abstract,
    )  # fmt: skip


def _filled(matrix: QuantisedMatrix, tensor: QuantisedTensor) -> Iterator[tuple[Any, np.ndarray]]:
    """Arrays of ``matrix``, each with the values of all rows of ``tensor`` in its terms."""
    repeats = tensor.group // matrix.group
    groups = matrix.scales.shape[-1]

    def by_group(values: np.ndarray) -> np.ndarray:
        everywhere = np.broadcast_to(values, tensor.scales.shape)
        return everywhere if repeats == 1 else np.repeat(everywhere, repeats, axis=1)[:, :groups]

    if matrix.bits == PAIR_BITS:
        yield matrix.codes, tensor.codes if tensor.is_paired else pair(tensor.codes)
    else:
        yield matrix.codes, tensor.codes_of()
    yield matrix.scales, by_group(tensor.scales)
    if matrix.zeros is not None:
        yield matrix.zeros, by_group(np.zeros((1, 1), np.uint8) if tensor.zeros is None else tensor.zeros)
    if matrix.minima is not None:
        yield matrix.minima, by_group(np.zeros((1, 1)) if tensor.minima is None else tensor.minima)
