"""Reading config.json, whatever version of transformers wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.models.config import Rope
from jaxserve.models.fields import LARGEST_COUNT, LARGEST_SIZE, Fields
from jaxserve.models.rope import ROPE_KINDS, rope_frequencies

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_LARGEST_HEAD = 2**14
_LARGEST_STRETCH = 1e6

# What each kind of rope takes, required first.
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_LONGROPE = ("factor", "attention_factor", "short_mscale", "long_mscale")
_YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ROPE_OPTIONAL = {"yarn": _YARN, "longrope": _LONGROPE, "proportional": ("factor", "partial_rotary_factor")}
_ROPE_OF_WHOLE_HEADS = ("proportional",)
"""Whose frequencies say which dimensions do not rotate."""
_ROPE_WITH_TRAINED_LENGTH = ("llama3", "yarn", "longrope")


class RawConfig(Fields):
    """The object of a config.json over a family's defaults; ``where`` is its name in messages."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str, prefix: str = "") -> None:
        super().__init__({**defaults, **values}, where, prefix)

    @property
    def architecture(self) -> str:
        return self.values["architectures"][0]

    def size(self, key: str, default: int | None = None) -> int:
        """Of a tensor's dimension."""
        return self.integer(key, default, high=LARGEST_SIZE)

    def count(self, key: str, default: int | None = None) -> int:
        """Of layers, experts or heads."""
        return self.integer(key, default, high=LARGEST_COUNT)

    def head_dim(self, default: int | None = None) -> int:
        return self.integer("head_dim", default, high=_LARGEST_HEAD)

    def require(self, key: str, supported: bool) -> None:
        """Refuse a model whose ``key`` is there and not ``supported``."""
        if self.flag(key, supported) != supported:
            raise ModelError(
                f"{self.where}: {self.prefix}{key} {not supported} is not supported; supported: {supported}"
            )

    def activation(self, key: str) -> str:
        """The activation under its name in ModelConfig."""
        found = self.text(key)
        if found not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ModelError(f"{self.where}: {self.prefix}{key} {found!r} is not supported; supported: {known}")
        return _ACTIVATIONS[found]

    def windows(self, num_layers: int, default_types: Sequence[str]) -> tuple[int | None, ...]:
        """ModelConfig.windows from ``sliding_window`` and ``layer_types``, by default ``default_types``."""
        types = self.texts("layer_types") or default_types
        unknown = sorted(set(types) - set(_LAYER_TYPES))
        if unknown:
            raise ModelError(
                f"{self.where}: {self.prefix}layer_types {', '.join(unknown)} not supported; "
                f"supported: {', '.join(_LAYER_TYPES)}"
            )
        if len(types) != num_layers:
            raise ModelError(
                f"{self.where}: {self.prefix}layer_types must name {num_layers} layers, found {len(types)}"
            )
        window = self.optional_integer("sliding_window")
        if window is None or "sliding_attention" not in types:
            return ()
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    def unrotated_layers(self, num_layers: int) -> tuple[int, ...]:
        """From ``no_rope_layers``, where 1 is a layer that rotates, or every ``no_rope_layer_interval``-th."""
        rotates = self.integers("no_rope_layers")
        if not rotates:
            every = self.integer("no_rope_layer_interval")
            rotates = [(layer + 1) % every for layer in range(num_layers)]
        if len(rotates) < num_layers:
            raise self.error("no_rope_layers", f"a list of at least {num_layers} numbers")
        return tuple(layer for layer in range(num_layers) if not rotates[layer])

    def rope_fields(self) -> Fields:
        """transformers 5's ``rope_parameters``, or ``rope_scaling``."""
        return self.fields("rope_scaling" if self.values.get("rope_scaling") else "rope_parameters")

    def local_rope(self, head_dim: int, theta: float) -> Rope:
        """Of the layers with a window, where theirs differs: a plain one with ``theta``, unless ``rope_parameters`` has
        one object for each kind of layer, as transformers 5 writes them."""
        options: dict[str, Any] = {"rope_theta": theta}
        if self.fields("rope_parameters").has("sliding_attention"):
            options = self.values["rope_parameters"]
        values = {"rope_parameters": options, "max_position_embeddings": self.values["max_position_embeddings"]}
        return RawConfig(values, {}, self.where, self.prefix).rope(head_dim, layers="sliding_attention")

    def rope(self, head_dim: int, *, layers: str | None = None, interleaved: bool = False) -> Rope:
        """From transformers 5's ``rope_parameters`` (of ``layers``, where there are several) or from ``rope_theta`` and
        ``rope_scaling``.

        Defaults and precedence are those of RotaryEmbeddingConfigMixin.standardize_rope_params in transformers.
        """
        found = self.rope_fields()
        if layers is not None and found.has(layers):
            found = found.fields(layers)
        kind = found.text("rope_type") or found.text("type") or "default"
        kind = {"su": "longrope"}.get(kind, kind)  # Phi-3's first name for it
        if kind not in ROPE_KINDS:
            raise ModelError(f"{self.where}: rope kind {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        theta = found.optional_number("rope_theta") or self.number("rope_theta", 10000.0)
        share = found.optional_number("partial_rotary_factor", high=1) or self.number(
            "partial_rotary_factor", 1.0, high=1
        )
        dim = head_dim if kind in _ROPE_OF_WHOLE_HEADS else int(head_dim * share)
        options = self._rope_options(found, kind, dim)
        rope = Rope(theta=float(theta), dim=dim, kind=kind, options=options, interleaved=interleaved)
        self._check_frequencies(rope, found)
        return rope

    def _rope_options(self, found: Fields, kind: str, dim: int) -> dict[str, Any]:
        """What ``kind`` takes, of the values in ``found``."""
        required = _ROPE_REQUIRED.get(kind, ())
        missing = [key for key in required if not found.has(key)]
        if missing:
            raise ModelError(f"{self.where}: rope kind {kind!r} needs {', '.join(missing)}")
        options = {
            key: _rope_option(key, found, dim) for key in (*required, *_ROPE_OPTIONAL.get(kind, ())) if found.has(key)
        }
        if kind in _ROPE_WITH_TRAINED_LENGTH:
            # Phi-3 and others keep the trained length outside of the rope options, and there it wins.
            key = "original_max_position_embeddings"
            inside = found.optional_integer(key) or self.integer("max_position_embeddings")
            options[key] = self.integer(key, inside)
        return options

    def _check_frequencies(self, rope: Rope, found: Fields) -> None:
        """Refuse values that are fine one by one and don't go together."""
        try:
            with np.errstate(all="ignore"):
                frequencies, scale = rope_frequencies(rope, trained=self.integer("max_position_embeddings"), max_len=1)
        except ArithmeticError:
            frequencies, scale = np.zeros(1), 1.0
        usable = frequencies >= 0 if rope.kind in _ROPE_OF_WHOLE_HEADS else frequencies > 0
        if not (np.isfinite(frequencies).all() and usable.all() and np.isfinite(scale)):
            raise ModelError(
                f"{self.where}: {found.prefix.removesuffix('.')} {found.values!r:.200} and rope_theta {rope.theta:g} "
                f"give no usable frequencies for {rope.dim} rotated dimensions"
            )


def all_but_every(number: int, num_layers: int) -> list[str]:
    """Types of layers of which every ``number``-th sees everything."""
    return ["sliding_attention" if (i + 1) % number else "full_attention" for i in range(num_layers)]


def _rope_option(key: str, found: Fields, dim: int) -> Any:
    if key in ("short_factor", "long_factor"):
        return found.numbers(key, dim // 2)
    if key == "truncate":
        return found.flag(key)
    return found.number(key, high=_LARGEST_STRETCH, zero=key.startswith("mscale"))
