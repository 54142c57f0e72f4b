"""jaxserve: stall-free LLM serving on JAX/XLA. The names below are the public API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.beam_search import BeamSearchParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, RequestError
from jaxserve.prompts import TextPrompt, TokensPrompt
from jaxserve.request import CompletionOutput, Logprob, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM
    from jaxserve.llm import LLM

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]


def __getattr__(name: str) -> Any:
    # These bring jax along; clients of a server must not pay for that.
    if name == "LLM":
        from jaxserve.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from jaxserve.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
