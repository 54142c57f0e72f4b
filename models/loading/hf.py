"""Hugging Face folders: config.json, generation_config.json and safetensors files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, by which safetensors looks it up)
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxserve.models.config import ModelConfig, ModelError, RopeScaling
from jaxserve.models.rope import ROPE_KINDS

DTYPES = ("F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


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


def architecture_of(raw: dict[str, Any]) -> str:
    """The architecture that a config.json names; ModelError unless it is exactly one."""
    found = raw.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise ModelError(f"config.json: architectures must be a list of one name, found {found!r}")
    return found[0]


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A Llama-family config.json (transformers' LlamaConfig and its defaults) as ModelConfig. Raises ModelError."""
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"config.json: quantization {method!r} is not supported; supported: {', '.join(DTYPES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")

    def number(key: str, default: float | None = None) -> Any:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be a number, found {raw.get(key)!r}")
        return value

    num_heads, hidden_size = number("num_attention_heads"), number("hidden_size")
    head_dim = number("head_dim", hidden_size // max(num_heads, 1))
    max_position_embeddings = number("max_position_embeddings", 2048)
    rope_theta, rope_scaling = _rope(raw, head_dim, max_position_embeddings)
    return ModelConfig(
        architecture=architecture_of(raw),
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _rope(raw: dict[str, Any], head_dim: int, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling from transformers 5's ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``.

    Defaults and precedence are those of RotaryEmbeddingConfigMixin.standardize_rope_params in transformers.
    """
    options = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    old_kind = options.pop("type", "default")
    kind = options.pop("rope_type", old_kind)
    theta = options.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    partial = options.pop("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
    if kind not in ROPE_KINDS:
        raise ModelError(f"config.json: rope kind {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if partial != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor {partial} is not supported; supported: 1.0")
    if kind == "default":
        return float(theta), None
    missing = [key for key in _ROPE_REQUIRED[kind] if options.get(key) is None]
    if missing:
        raise ModelError(f"config.json: rope kind {kind!r} needs {', '.join(missing)}")
    for key in ("short_factor", "long_factor"):
        if key in options and len(options[key]) != head_dim // 2:
            raise ModelError(f"config.json: {key} must hold {head_dim // 2} numbers, found {len(options[key])}")
    if kind in ("llama3", "yarn", "longrope"):
        # Phi-3 and others keep the trained length outside of the rope options, and there it wins.
        inside = options.get("original_max_position_embeddings") or max_position_embeddings
        options["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or inside
    return float(theta), RopeScaling(kind=kind, options=options)


def eos_token_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of a generation_config.json or config.json: an integer, a list of them, or missing."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(i for i in ids if isinstance(i, int))


class SafetensorsSource:
    """The tensors of a folder's safetensors files, in one or in shards, memory-mapped. Raises ModelError."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Any] = {}
        wrong = {}
        for path, expected in _shards(folder).items():
            file = _open(path)
            held = set(file.keys())
            if expected - held:
                raise ModelError(f"{path}: missing tensors that {_INDEX} places there: {_listed(expected - held)}")
            for name in expected or held:
                self._file_of[name] = file
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    wrong[name] = dtype
        if wrong:
            found = _listed(f"{name} ({dtype})" for name, dtype in wrong.items())
            raise ModelError(f"{folder}: tensor types not supported: {found}; supported: {', '.join(DTYPES)}")

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


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
