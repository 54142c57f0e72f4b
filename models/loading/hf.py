"""Safetensors files of Hugging Face folders."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.errors import ModelError
from jaxserve.models.fields import Fields
from jaxserve.models.loading.files import read_json, refuse_pointer, unreadable

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """The tensors of a folder's safetensors files, in one or in shards, mapped into memory. Raises ModelError.

    ``name_of`` gives a file's tensor name as the caller wants it, None for tensors to leave out.
    """

    def __init__(
        self,
        folder: Path,
        name_of: Callable[[str], str | None] = lambda name: name,
        dtypes: Mapping[str, np.dtype] = DTYPES,
    ) -> None:
        self._tensors: dict[str, np.ndarray] = {}
        stored_as: dict[str, str] = {}
        wrong = {}
        for path, expected in _shards(folder).items():
            found = _map(path, dtypes)
            if expected - found.keys():
                missing = _listed(expected - found.keys())
                raise ModelError(f"{path}: missing tensors that {_INDEX} places there: {missing}")
            for stored in expected or found:
                name, tensor = name_of(stored), found[stored]
                if name is None:
                    continue
                if name in stored_as:
                    raise ModelError(f"{folder}: {stored_as[name]} and {stored} are both {name}")
                stored_as[name] = stored
                if isinstance(tensor, np.ndarray):
                    self._tensors[name] = tensor
                else:
                    wrong[stored] = tensor
        if wrong:
            listed = _listed(f"{name} ({dtype})" for name, dtype in wrong.items())
            raise ModelError(f"{folder}: tensor types not supported: {listed}; supported: {', '.join(dtypes)}")

    def take(self, name: str, new_name: str | None = None) -> None:
        """Give the tensor ``name`` the ``new_name``, or take it out."""
        tensor = self._tensors.pop(name)
        if new_name is not None:
            self._tensors[new_name] = tensor

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _map(path: Path, dtypes: Mapping[str, np.dtype]) -> dict[str, np.ndarray | str]:
    """Each tensor of a file as a view of the mapped file, or the name of its type where that is not supported."""
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
    tensors: dict[str, np.ndarray | str] = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        known = dtypes.get(entry["dtype"])
        tensors[name] = entry["dtype"] if known is None else data[first:end].view(known).reshape(entry["shape"])
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
