"""Reading config.json, whatever version of transformers wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.models.config import ModelError, Rope
from jaxserve.models.rope import ROPE_KINDS

_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class RawConfig:
    """The object of a config.json over a family's defaults; ``where`` is its name in messages.

    Every complaint is a ModelError that names the key, what was found and what is supported.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.values = {**defaults, **values}
        self.where = where

    def number(self, key: str, default: float | None = None) -> Any:
        """A number; ``default`` where the key is missing or null."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} must be a number, found {self.values.get(key)!r}")
        return value

    def optional(self, key: str) -> Any:
        """A number, or None where the key is missing or null."""
        return None if self.values.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        return bool(self.values.get(key))

    def require(self, key: str, supported: object) -> None:
        """Refuse a model whose ``key`` is there and not ``supported``."""
        found = self.values.get(key, supported)
        if found != supported:
            raise ModelError(f"{self.where}: {key} {found!r} is not supported; supported: {supported!r}")

    def activation(self, key: str) -> str:
        """The activation under its name in ModelConfig."""
        found = self.values.get(key)
        if found not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ModelError(f"{self.where}: {key} {found!r} is not supported; supported: {known}")
        return _ACTIVATIONS[found]

    def windows(self, num_layers: int, default_types: Sequence[str]) -> tuple[int | None, ...]:
        """ModelConfig.windows from ``sliding_window`` and ``layer_types``, by default ``default_types``."""
        types = self.values.get("layer_types") or default_types
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ModelError(
                f"{self.where}: layer_types {', '.join(unknown)} not supported; "
                "supported: full_attention, sliding_attention"
            )
        if len(types) != num_layers:
            raise ModelError(f"{self.where}: layer_types must name {num_layers} layers, found {len(types)}")
        window = self.optional("sliding_window")
        if window is None or "sliding_attention" not in types:
            return ()
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    def rope(self, head_dim: int, *, layers: str | None = None) -> Rope:
        """From transformers 5's ``rope_parameters`` (of ``layers``, where there are several) or from ``rope_theta`` and
        ``rope_scaling``.

        Defaults and precedence are those of RotaryEmbeddingConfigMixin.standardize_rope_params in transformers.
        """
        raw = self.values
        options = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
        if layers is not None and layers in options:
            options = dict(options[layers])
        old_kind = options.pop("type", "default")
        kind = options.pop("rope_type", old_kind)
        kind = {"su": "longrope"}.get(kind, kind)  # Phi-3's first name for it
        theta = options.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
        rotated = options.pop("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
        dim = int(head_dim * rotated)
        if kind not in ROPE_KINDS:
            raise ModelError(f"{self.where}: rope kind {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        if kind == "default":
            return Rope(theta=float(theta), dim=dim)
        missing = [key for key in _ROPE_REQUIRED.get(kind, ()) if options.get(key) is None]
        if missing:
            raise ModelError(f"{self.where}: rope kind {kind!r} needs {', '.join(missing)}")
        for key in ("short_factor", "long_factor"):
            if key in options and len(options[key]) != dim // 2:
                raise ModelError(f"{self.where}: {key} must hold {dim // 2} numbers, found {len(options[key])}")
        if kind in ("llama3", "yarn", "longrope"):
            # Phi-3 and others keep the trained length outside of the rope options, and there it wins.
            inside = options.get("original_max_position_embeddings") or self.number("max_position_embeddings")
            options["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or inside
        return Rope(theta=float(theta), dim=dim, kind=kind, options=options)
