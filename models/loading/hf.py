"""Safetensors files of Hugging Face folders."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ModelError
from jaxserve.models.family import undivided
from jaxserve.models.fields import Fields
from jaxserve.models.loading.files import read_json, refuse_pointer, unreadable

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types of weights that are stored as they are."""
DTYPES = FLOATS | {
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I16": np.dtype(np.int16), "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32), "I64": np.dtype(np.int64), "U64": np.dtype(np.uint64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of a folder's safetensors files, in one or in shards, mapped into memory. Raises ModelError.

    ``name_of`` gives a file's tensor name as the caller wants it, None for tensors to leave out; ``supported`` are the
    types that there may be, and ``divide`` is Family's.
    """

    def __init__(
        self,
        folder: Path,
        name_of: Callable[[str], str | None] = lambda name: name,
        supported: Collection[str] = FLOATS.keys(),
        divide: Callable[[str, np.ndarray], Mapping[str, np.ndarray]] = undivided,
    ) -> None:
        self.folder = folder
        self._tensors: dict[str, _Tensor] = {}
        for path, expected in _shards(folder).items():
            found = _map(path)
            if expected - found.keys():
                missing = _listed(expected - found.keys())
                raise ModelError(f"{path}: missing tensors that {_INDEX} places there: {missing}")
            for stored in expected or found:
                for given, values in divide(stored, found[stored].values).items():
                    name = name_of(given)
                    if name is None:
                        continue
                    if name in self._tensors:
                        raise ModelError(f"{folder}: {self._tensors[name].stored_as} and {stored} are both {name}")
                    self._tensors[name] = replace(found[stored], values=values)
        self.refuse_others(supported)

    def refuse_others(self, supported: Collection[str]) -> None:
        """Raise ModelError where a tensor's type is none of these."""
        wrong = {found.stored_as: found.dtype for found in self._tensors.values() if found.dtype not in supported}
        if wrong:
            listed = _listed(f"{name} ({dtype})" for name, dtype in wrong.items())
            raise ModelError(f"{self.folder}: tensor types not supported: {listed}; supported: {', '.join(supported)}")

    def take(self, name: str, new_name: str | None = None) -> None:
        """Give the tensor ``name`` the ``new_name``, or take it out."""
        tensor = self._tensors.pop(name)
        if new_name is not None:
            self._tensors[new_name] = tensor

    def stored_as(self, name: str) -> str:
        """Its name in the file."""
        return self._tensors[name].stored_as

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].values.shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].values


@dataclass(frozen=True, eq=False)
class _Tensor:
    stored_as: str
    dtype: str
    values: np.ndarray
    """A view of the mapped file; bytes where the type is none of DTYPES."""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _map(path: Path) -> dict[str, _Tensor]:
    """Each tensor of a file."""
    refuse_pointer(path)
    try:
        # The library checks the header against the file's length; its own reads would copy whole tensors.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        data = np.memmap(path, np.uint8, mode="r", offset=8 + header_bytes) if header else np.empty(0, np.uint8)
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        values, known = data[first:end], DTYPES.get(entry["dtype"])
        values = values if known is None else values.view(known).reshape(entry["shape"])
        tensors[name] = _Tensor(name, entry["dtype"], values)
    return tensors


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Each file to read and the tensors that the index expects in it; none where there is no index.

    As transformers chooses them: the one file, the index, any other safetensors files.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return {single: set()}
    if index.is_file():
        return _indexed(folder, index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = _listed(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise ModelError(f"{folder}: holds no .safetensors files" + (f"; found: {others}" if others else ""))
    return {file: set() for file in files}


def _indexed(folder: Path, index: Path) -> dict[Path, set[str]]:
    weight_map = Fields(read_json(index), index).fields("weight_map")
    if not weight_map.values:
        raise ModelError(f"{index}: weight_map must name the file of each tensor, found none")
    shards: dict[Path, set[str]] = defaultdict(set)
    for name in weight_map.values:
        file = weight_map.text(name) or ""
        if not file or Path(file).is_absolute() or ".." in Path(file).parts:
            raise weight_map.error(name, "the name of a file in this folder")
        shards[folder / file].add(name)
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise ModelError(f"{index}: names files that are not there: {_listed(missing)}")
    return shards
