"""Which family serves which architecture, under the names of Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig, ModelError
from jaxserve.models.falcon import FALCON
from jaxserve.models.family import Family
from jaxserve.models.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_VISION
from jaxserve.models.gpt2 import GPT2
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.internlm import INTERNLM, INTERNLM2
from jaxserve.models.llama import LLAMA, MISTRAL
from jaxserve.models.mixtral import MIXTRAL
from jaxserve.models.phi3 import PHI3
from jaxserve.models.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "InternLMForCausalLM": INTERNLM,
    "InternLM2ForCausalLM": INTERNLM2,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "FalconForCausalLM": FALCON,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_VISION,
    "Phi3ForCausalLM": PHI3,
    "GPT2LMHeadModel": GPT2,
}


def family_of(architecture: str) -> Family:
    """What serves ``architecture``; ModelError lists the supported ones."""
    if architecture not in FAMILIES:
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def read_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The object of a config.json as ModelConfig. Raises ModelError, naming the key."""
    found = values.get("architectures")
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise ModelError(f"{where}: architectures must be a list of one name, found {found!r}")
    family = family_of(found[0])
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{where}: quantization {method!r} is not supported; supported: F32, F16, BF16")
    inner = values
    if family.nested is not None:
        inner = {**(values.get(family.nested) or {}), "architectures": found}
    return family.read(RawConfig(inner, family.defaults, where))
