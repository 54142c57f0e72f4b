"""Whether a folder's model is quantised, and how: in one of the files in which people's models say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models.fields import Fields
from jaxserve.models.loading.files import read_json
from jaxserve.models.loading.quantised import awq, compressed_tensors, fp8, gptq
from jaxserve.models.loading.quantised.format import Format

FORMATS: dict[str, Callable[[Fields], Format]] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read,
    "modelopt": fp8.read_modelopt,
    "auto-round": gptq.read_auto_round,
    "intel/auto-round": gptq.read_auto_round,
}
"""By quant_method."""
METHOD_OF_EXPERTS = "mxfp4"
"""That of gpt-oss, whose experts are no matrices by themselves: models/loading/mxfp4.py."""
_KEYS = {"quantization_config": None, "compression_config": "compressed-tensors"}
"""Of config.json, each with the method of a configuration that does not name one."""
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Beside config.json, for models older than those keys."""


def quantisation(folder: Path, config: Mapping[str, Any]) -> Format | None:
    """Of ``config``, the object of config.json, or of the files beside it; None where weights are stored as they are.

    Raises ModelError for what is not supported, naming file and key.
    """
    whole = Fields(config, folder / "config.json")
    for fields in (whole, whole.fields("text_config")):
        for key, method in _KEYS.items():
            if fields.has(key):
                return _read(fields.fields(key), method)
    for name, method in _FILES.items():
        values = read_json(folder / name)
        if values:
            return _read(Fields(values, folder / name), method)
    return None


def _read(fields: Fields, default: str | None) -> Format:
    key = "method" if fields.has("method") and not fields.has("quant_method") else "quant_method"
    method = fields.text(key, default)
    if method is None or method.lower() not in FORMATS:
        raise ModelError(
            f"{fields.where}: {fields.prefix}{key} {method!r} is not supported; supported: {', '.join(FORMATS)}, "
            f"{METHOD_OF_EXPERTS}"
        )
    return FORMATS[method.lower()](fields)
