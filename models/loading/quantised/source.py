"""The tensors of a quantised checkpoint, as if it were none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.loading.hf import FLOATS, SafetensorsSource
from jaxserve.models.loading.quantised.format import Format, Tensors
from jaxserve.models.loading.quantised.tensor import Encoding, QuantisedTensor


@dataclass(frozen=True)
class _Module:
    name: str
    """In the file."""
    tensors: Tensors
    encoding: Encoding


class QuantisedSource:
    """A TensorSource of ``tensors`` in which each quantised module ``X`` has one tensor, ``X.weight``.

    Opening it reads no weights. Raises ModelError that names every module which does not fit the configuration.
    """

    def __init__(self, tensors: SafetensorsSource, format: Format) -> None:
        self._format = format
        self._tensors = tensors
        self._modules: dict[str, _Module] = {}
        problems = []
        for name, found in _by_module(tensors, format.suffixes).items():
            if not format.is_quantised(found):
                continue
            some = next(iter(found))
            stored = tensors.stored_as(f"{name}.{some}").removesuffix(f".{some}")
            try:
                self._modules[f"{name}.weight"] = _Module(stored, found, format.encoding(stored, found))
            except ModelError as error:
                problems.append(str(error))
            for suffix in found:
                tensors.take(f"{name}.{suffix}")
        if problems:
            raise ModelError(f"{tensors.folder}: {'; '.join(problems)}")
        tensors.refuse_others(FLOATS)

    def take(self, name: str, new_name: str | None = None) -> None:
        """As SafetensorsSource's."""
        module = self._modules.pop(name, None)
        if module is None:
            self._tensors.take(name, new_name)
        elif new_name is not None:
            self._modules[new_name] = module

    def names(self) -> set[str]:
        return self._tensors.names() | self._modules.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._modules[name].encoding.shape if name in self._modules else self._tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        return self.quantised(name).dequantised() if name in self._modules else self._tensors.read(name)

    def encoding(self, name: str) -> Encoding | None:
        return self._modules[name].encoding if name in self._modules else None

    def quantised(self, name: str) -> QuantisedTensor:
        module = self._modules[name]
        try:
            return self._format.decode(module.name, module.tensors)
        except ModelError as error:
            raise ModelError(f"{self._tensors.folder}: {error}") from error


def named_by_module(name_of: Callable[[str], str | None], suffixes: Collection[str]) -> Callable[[str], str | None]:
    """``name_of`` for the tensors of quantised modules too: ``X.suffix`` goes where ``X.weight`` does."""

    def name_of_any(stored: str) -> str | None:
        module, _, suffix = stored.rpartition(".")
        if suffix not in suffixes:
            return name_of(stored)
        name = name_of(f"{module}.weight")
        return None if name is None else f"{name.removesuffix('weight')}{suffix}"

    return name_of_any


def _by_module(tensors: SafetensorsSource, suffixes: Collection[str]) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name in sorted(tensors.names()):
        module, _, suffix = name.rpartition(".")
        if suffix in suffixes or suffix == "weight":
            found[module][suffix] = tensors.read(name)
    return found
