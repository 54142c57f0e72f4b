"""How a parameter is assembled from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Named tensors of a checkpoint, under their Hugging Face names, whatever the file format."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in its stored float type (quantised ones as float32); memory-mapped where the format allows."""
        ...


def unchanged(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Weight:
    """One parameter: ``build(*[source.read(name) for name in names])`` has the parameter's shape."""

    names: tuple[str, ...]
    build: Callable[..., np.ndarray]
