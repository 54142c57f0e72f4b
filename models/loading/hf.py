"""Hugging Face folders: config.json, generation_config.json and safetensors files."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.models.config import ModelError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``, empty where there is no such file; ModelError where it holds anything else."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must hold a JSON object, found {type(data).__name__}")
    return data


def eos_token_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of a generation_config.json or config.json: an integer, a list of them, or missing."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(i for i in ids if isinstance(i, int))


class SafetensorsSource:
    """The tensors of a folder's safetensors files, in one or in shards, mapped into memory. Raises ModelError.

    ``name_of`` gives a file's tensor name as the caller wants it, None for tensors to leave out.
    """

    def __init__(self, folder: Path, name_of: Callable[[str], str | None] = lambda name: name) -> None:
        self._tensors: dict[str, np.ndarray] = {}
        wrong = {}
        for path, expected in _shards(folder).items():
            found = _map(path)
            if expected - found.keys():
                missing = _listed(expected - found.keys())
                raise ModelError(f"{path}: missing tensors that {_INDEX} places there: {missing}")
            for stored in expected or found:
                name, tensor = name_of(stored), found[stored]
                if name is None:
                    continue
                if isinstance(tensor, np.ndarray):
                    self._tensors[name] = tensor
                else:
                    wrong[stored] = tensor
        if wrong:
            listed = _listed(f"{name} ({dtype})" for name, dtype in wrong.items())
            raise ModelError(f"{folder}: tensor types not supported: {listed}; supported: {', '.join(DTYPES)}")

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _map(path: Path) -> dict[str, np.ndarray | str]:
    """Each tensor of a file as a view of the mapped file, or the name of its type where that is not supported."""
    try:
        # The library checks the header against the file's length; its own reads would copy whole tensors.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        data = np.memmap(path, np.uint8, mode="r", offset=8 + header_bytes) if header else np.empty(0, np.uint8)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    header.pop("__metadata__", None)
    tensors: dict[str, np.ndarray | str] = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        known = DTYPES.get(entry["dtype"])
        tensors[name] = entry["dtype"] if known is None else data[first:end].view(known).reshape(entry["shape"])
    return tensors


def _shards(folder: Path) -> dict[Path, set[str]]:
    """Each file to read and the tensors that the index expects in it; none where there is no index."""
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if weight_map:
        shards: dict[Path, set[str]] = defaultdict(set)
        for name, file in weight_map.items():
            # Only the last part: an index must not reach outside of its folder.
            shards[folder / Path(file).name].add(name)
        return shards
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: holds no .safetensors files")
    return {file: set() for file in files}
