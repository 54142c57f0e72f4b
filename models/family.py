"""What the program knows of one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.weights import Weight


def same_name(name: str) -> str | None:
    return name


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a model of one architecture is configured, built and loaded."""

    models: str
    """What it serves, for people."""
    read: Callable[[RawConfig], ModelConfig]
    """Raises ModelError."""
    weights: Callable[[ModelConfig], dict[str, Weight]]
    """Every parameter's path -> the tensors it is built from."""
    model: type[Decoder] = Decoder
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """config.json's values where it has none: those of transformers' configuration class."""
    nested: str | None = None
    """The key of config.json that holds the language model's part."""
    tensor_name: Callable[[str], str | None] = same_name
    """A file's tensor name as ``weights`` has it; None for tensors that are not needed."""
