"""What a format of quantised checkpoints says of a file's tensors, and how it checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor

Tensors = Mapping[str, np.ndarray]
"""Of one module ``X``, such as a linear layer: its tensors ``X.suffix``, by suffix."""

SCALE_TYPES = ("float32", "float16", "bfloat16", "float8_e8m0fnu")


class Format(Protocol):
    """One way to store quantised matrices, as a checkpoint's configuration describes it."""

    suffixes: frozenset[str]
    """Of a quantised module's tensors besides ``weight``, those that are not needed included."""

    def is_quantised(self, tensors: Tensors) -> bool: ...

    def encoding(self, module: str, tensors: Tensors) -> Encoding:
        """Of the module's weight. Raises ModelError for tensors that do not fit the configuration or one another; reads
        no large tensor."""
        ...

    def decode(self, module: str, tensors: Tensors) -> QuantisedTensor:
        """The weight of a module whose ``encoding`` was fine. Raises ModelError for values that make no sense."""
        ...

    def __str__(self) -> str:
        """For the log."""
        ...


def expect(
    module: str,
    tensors: Tensors,
    suffix: str,
    dtypes: Sequence[str],
    shape: Sequence[int | None] | None = None,
    why: str = "",
) -> np.ndarray:
    """``X.suffix``, which must be of one of these types, and of this shape, where None is any size."""
    tensor = tensors.get(suffix)
    if tensor is None:
        raise ModelError(f"{module}.{suffix} is missing{why}")
    fits = shape is None or (
        tensor.ndim == len(shape)
        and all(wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True))
    )
    if tensor.dtype.name not in dtypes or not fits:
        sizes = "" if shape is None else f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
        found = f"{tensor.dtype.name}{list(tensor.shape)}"
        raise ModelError(f"{module}.{suffix} must be {' or '.join(dtypes)} {sizes}{why}, found {found}")
    return tensor


def refuse_excluded(module: str, where: str) -> NoReturn:
    """For a module that is quantised in the file and not by the configuration's ``where``."""
    raise ModelError(f"{module} is quantised, but {where} leaves it as it is")


def num_groups(inputs: int, group: int) -> int:
    return -(-inputs // max(group, 1))


def column_order(name: str, groups: np.ndarray | None, group: int) -> np.ndarray | None:
    """QuantisedTensor.order, from each input's group ``int32[in]``; None where they are in order, which some files say
    by zeros alone. Raises ModelError.

    ``name``: of that tensor, in messages.
    """
    if groups is None or not groups.any():
        return None
    expected = np.arange(len(groups), dtype=np.int32) // group
    if np.array_equal(groups, expected):
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], expected):
        raise ModelError(f"{name} must put {group} of {len(groups)} inputs into each group, the first ones from 0 on")
    return order
