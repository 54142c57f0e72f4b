"""Which class serves which architecture, under the names of Hugging Face's config.json."""

from __future__ import annotations

from jaxserve.models.config import ModelError
from jaxserve.models.llama import Llama

SUPPORTED: dict[str, type[Llama]] = {"LlamaForCausalLM": Llama}


def model_class(architecture: str) -> type[Llama]:
    """The model class of ``architecture``; ModelError lists the supported ones."""
    if architecture not in SUPPORTED:
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED)}")
    return SUPPORTED[architecture]
