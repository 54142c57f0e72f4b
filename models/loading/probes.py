"""Files of probes: embeddings that scripts/train_ppd.py has trained for one model (ModelConfig.num_probes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxserve.errors import ConfigError
from jaxserve.models.loading.files import refuse_pointer, unreadable

TENSOR = "probes"


def read_probes(path: Path, number: int, hidden_size: int) -> np.ndarray:
    """The first ``number`` of a file's probes, ``float32[number, hidden_size]``. Raises ConfigError and ModelError."""
    refuse_pointer(path)
    try:
        found = load_file(path).get(TENSOR)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    if found is None or found.ndim != 2 or found.shape[1] != hidden_size:
        shape = "none" if found is None else str(list(found.shape))
        raise ConfigError(f"ppd_probes must hold {TENSOR} of {hidden_size} numbers each, {path} has {shape}")
    if len(found) < number:
        raise ConfigError(
            f"num_speculative_tokens must not exceed the {len(found)} probes of {path}, one for each guess, "
            f"got {number}"
        )
    return found[:number].astype(np.float32)


def write_probes(path: Path, probes: np.ndarray) -> None:
    """``float32[number, hidden_size]``"""
    save_file({TENSOR: np.ascontiguousarray(probes, np.float32)}, path)
