"""What the program knows of one architecture."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.weights import Weight


def same_name(name: str) -> str | None:
    return name


def undivided(name: str, tensor: np.ndarray) -> Mapping[str, np.ndarray]:
    return {name: tensor}


def language_model_name(name: str) -> str | None:
    """The language model's tensors of a file that can also see."""
    if re.match(r"(model\.)?(vision_tower|vision_model|multi_modal_projector|mm_projector)\.", name):
        return None
    # transformers 5 puts the model's prefix first, the hub's files have it second.
    return re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name).removeprefix("language_model.")


def _layer(name: str) -> int:
    """The number of the layer that a tensor is in, -1 outside of all."""
    found = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


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
    base: str = "model"
    """The prefix of all tensors but the head's, which a file may lack or have twice: what transformers calls
    base_model_prefix."""
    has_later_layers: bool = False
    """Whether files have layers behind the last one, which guess further tokens and are left out."""
    tensor_name: Callable[[str], str | None] = same_name
    """A file's tensor name as ``weights`` has it, up to the prefix ``base``; None for tensors that are not needed."""
    unused: Callable[[ModelConfig], Collection[str]] = lambda config: ()
    """Tensors of some files, under such names, that a model has no use for."""
    divide: Callable[[str, np.ndarray], Mapping[str, np.ndarray]] = undivided
    """A file's tensor -> those in it, views, under names of the same form, where some files have several in one."""

    def names_for(self, config: ModelConfig) -> Callable[[str], str | None]:
        """A file's tensor name -> the name in ``weights`` of ``config``, whether it has the prefix ``base`` or not.

        As transformers' rename_source_key finds it. None for tensors that are not needed; others keep their names.
        """
        untied = dataclasses.replace(config, tie_word_embeddings=False)  # a tied model's file may have a head
        wanted = {part.name for weight in self.weights(untied).values() for part in weight}
        unused = set(self.unused(config))

        def name_of(stored: str) -> str | None:
            name = self.tensor_name(stored)
            if name is not None and self.has_later_layers and _layer(name) >= config.num_layers:
                return None
            if name is None or name in wanted:
                return name
            candidates = (f"{self.base}.{name}", name.removeprefix(f"{self.base}."))
            if not unused.isdisjoint((name, *candidates)):
                return None
            return next((candidate for candidate in candidates if candidate in wanted), name)

        return name_of
