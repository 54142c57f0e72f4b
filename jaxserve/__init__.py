"""jaxserve: stall-free LLM serving on JAX/XLA. The names below are the public API."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError, RequestError
from jaxserve.prompts import TextPrompt, TokensPrompt
from jaxserve.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.llm import LLM

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
]


# LLM brings jax along, EngineConfig numpy; clients of a server must not pay for that.
_IMPORTED_LATER = {"LLM": "jaxserve.llm", "EngineConfig": "jaxserve.config"}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_LATER:
        return getattr(import_module(_IMPORTED_LATER[name]), name)
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
