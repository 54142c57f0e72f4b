"""Which family serves which architecture, under the names of Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig
from jaxserve.models.falcon import FALCON
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_VISION
from jaxserve.models.gpt2 import GPT2
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.internlm import INTERNLM, INTERNLM2
from jaxserve.models.llama import LLAMA, MISTRAL
from jaxserve.models.mixtral import MIXTRAL
from jaxserve.models.phi3 import PHI3
from jaxserve.models.qwen import QWEN2, QWEN3, QWEN3_MOE
from jaxserve.models.qwen_hybrid import QWEN3_5

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "InternLMForCausalLM": INTERNLM,
    "InternLM2ForCausalLM": INTERNLM2,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3_5ForCausalLM": QWEN3_5,
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
    top = Fields(values, where)
    found = top.texts("architectures")
    if found is None or len(found) != 1:
        raise top.error("architectures", "a list of one name")
    family = family_of(found[0])
    inner = top if family.nested is None else top.fields(family.nested)
    return family.read(RawConfig({**inner.values, "architectures": found}, family.defaults, where, inner.prefix))
