"""The sampling defaults that a model brings along, as fields of SamplingParams."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelError, RequestError
from jaxserve.models.loading.files import read_json
from jaxserve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FIELDS = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
"""What a model may choose."""

# do_sample is not read, as in vLLM: transformers takes it for false wherever an author left it out, so false does not
# say that greedy outputs are wanted; temperature 0 does.
_HF_FIELDS = {name: name for name in FIELDS if name != "max_tokens"} | {"max_new_tokens": "max_tokens"}
_GGUF = "general.sampling."
_GGUF_FIELDS = {
    f"{_GGUF}temp": "temperature",
    f"{_GGUF}top_p": "top_p",
    f"{_GGUF}top_k": "top_k",
    f"{_GGUF}min_p": "min_p",
}

# What changes outputs and cannot be served, with the value that does nothing; null, 0 and empty do nothing anywhere.
_HF_UNSUPPORTED = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "typical_p": 1, "top_h": 0, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "min_length": 0, "min_new_tokens": 0, "max_time": 0, "stop_strings": 0, "num_beams": 1, "penalty_alpha": 0,
    "dola_layers": 0, "guidance_scale": 1, "bad_words_ids": 0, "force_words_ids": 0, "suppress_tokens": 0,
    "begin_suppress_tokens": 0, "forced_bos_token_id": 0, "forced_eos_token_id": 0, "sequence_bias": 0,
    "exponential_decay_length_penalty": 0, "token_healing": 0, "watermarking_config": 0,
}  # fmt: skip
_GGUF_UNSUPPORTED = {
    f"{_GGUF}penalty_repeat": 1,
    f"{_GGUF}xtc_probability": 0,
    f"{_GGUF}mirostat": 0,
    f"{_GGUF}sequence": 0,
}


def from_hf(path: Path) -> dict[str, Any]:
    """Those of a generation_config.json, none where there is no such file. Raises ModelError."""
    raw = read_json(path)
    _warn(path, raw, _HF_UNSUPPORTED)
    return checked(path, raw, _HF_FIELDS)


def from_gguf(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a GGUF file's metadata (llama.cpp's convert_hf_to_gguf.py keeps them). Raises ModelError."""
    _warn(path, metadata, _GGUF_UNSUPPORTED)
    return checked(path, metadata, _GGUF_FIELDS)


def checked(path: Path, raw: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The values of ``raw`` that are not null; ``fields`` maps its keys to SamplingParams'. Raises ModelError."""
    defaults = {}
    for key, field in fields.items():
        value = raw.get(key)
        if value is None:
            continue
        try:
            SamplingParams(**{field: value})
        except RequestError as error:
            raise ModelError(f"{path}: {key}{str(error).removeprefix(field)}") from error
        defaults[field] = value
    return defaults


def _warn(path: Path, raw: Mapping[str, Any], unsupported: Mapping[str, float]) -> None:
    found = [f"{key} = {raw[key]!r:.80}" for key, idle in unsupported.items() if raw.get(key) and raw[key] != idle]
    if found:
        logger.warning("%s: not supported and ignored, though outputs depend on it: %s", path, ", ".join(found))
