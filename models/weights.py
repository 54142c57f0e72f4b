"""How a parameter is assembled from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Named tensors of a checkpoint, whatever the file format, under the names that Hugging Face's hub has them."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored float type, mapped from the file; quantised ones as a new float32 array."""
        ...


def unchanged(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Part:
    """A tensor's place in a parameter: ``view(tensor)`` lies there from index ``start`` on (0 where it is short).

    ``view`` reshapes, slices and transposes only, so that it stays a view of the mapped file and a device's shard of
    the parameter reads its own bytes.
    """

    name: str
    view: Callable[[np.ndarray], np.ndarray] = unchanged
    start: tuple[int, ...] = ()

    def place(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where a view of ``shape`` lies in the parameter."""
        start = self.start + (0,) * (len(shape) - len(self.start))
        return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))


Weight = tuple[Part, ...]
"""One parameter: parts that fill it, each element once."""


def whole(name: str, view: Callable[[np.ndarray], np.ndarray] = unchanged) -> Weight:
    """A parameter that is one tensor."""
    return (Part(name, view),)


def stacked(*names: str, start: tuple[int, ...] = ()) -> Weight:
    """Tensors of one shape along a new axis, after as many axes of length 1 as ``start`` has."""
    lead = (None,) * (len(start) + 1)
    return tuple(Part(name, lambda tensor: tensor[lead], (*start, i)) for i, name in enumerate(names))
