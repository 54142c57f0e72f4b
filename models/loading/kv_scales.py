"""Scales of an fp8 KV cache that a checkpoint brings, under the names that quantisers have for them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.loading.hf import SafetensorsSource

_ATTENTION = r"(?:.*\.)?(\d+)\.\w+\."
_SCALES = (
    re.compile(_ATTENTION + r"(?:qkv_proj\.|[kv]_proj\.)?([kv])_scale"),  # llm-compressor; ModelOpt, behind the layer's
    re.compile(_ATTENTION + r"([kv])_proj\.output_scale"),  # early compressed-tensors
    re.compile(_ATTENTION + r"(kv)_scale"),  # AutoFP8
)
_UNUSED = re.compile(_ATTENTION + r"(?:q_proj\.)?(?:q_scale|prob_scale|output_scale|prob_output_scale)")
"""For kernels that multiply in float8, queries and probabilities too."""


def take(source: SafetensorsSource, num_layers: int) -> np.ndarray | None:
    """``float32[layers, 2]``, each layer's scale of keys and of values, taken out of ``source``; None without any.

    Raises ModelError where a layer lacks one, or has one that is no positive number.
    """
    scales = np.zeros((num_layers, 2), np.float32)
    is_found = False
    for name in sorted(source.names()):
        if _UNUSED.fullmatch(name):
            source.take(name)
            continue
        match = next(filter(None, (pattern.fullmatch(name) for pattern in _SCALES)), None)
        if match is None or int(match[1]) >= num_layers:
            continue
        value = _value(source.folder, source.stored_as(name), source.read(name))
        for kind in match[2]:
            scales[int(match[1]), "kv".index(kind)] = value
        source.take(name)
        is_found = True
    missing = [f"{'kv'[kind]} of layer {layer}" for layer, kind in np.argwhere(scales == 0).tolist()]
    if is_found and missing:
        raise ModelError(f"{source.folder}: has scales of the KV cache, but not {', '.join(missing)}")
    return scales if is_found else None


def _value(folder: Path, name: str, tensor: np.ndarray) -> float:
    value = float(tensor.astype(np.float32).reshape(-1)[0]) if tensor.size == 1 else np.nan
    if not (np.isfinite(value) and value > 0):
        found = value if tensor.size == 1 else f"shape {list(tensor.shape)}"
        raise ModelError(f"{folder}: {name} must be one positive number, found {found}")
    return value
