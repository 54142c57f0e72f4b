"""Small files of a checkpoint, and what lies in place of large ones where a download was not finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelError

_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raise ModelError if ``path`` is what Git leaves in place of a file that Git LFS has not fetched."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise unreadable(path, error) from error
    if start == _POINTER:
        raise ModelError(
            f"{path}: a Git LFS pointer, not the file itself; run git lfs install and git lfs pull in {path.parent}, "
            "or download the model from the hub"
        )


def unreadable(path: Path, error: object) -> ModelError:
    return ModelError(f"{path}: cannot be read: {error}")


def read_text(path: Path) -> str:
    """The text in ``path``, a byte order mark left out. Raises ModelError."""
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``, empty where there is no such file; ModelError where it holds anything else."""
    if not path.exists():
        return {}
    try:
        data = json.loads(read_text(path))
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must hold a JSON object, found {type(data).__name__}")
    return data
