"""Which family serves which architecture, under the names of Hugging Face's config.json."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models.cohere import COHERE2
from jaxserve.models.config import ModelConfig
from jaxserve.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_VISION, YOUTU
from jaxserve.models.falcon import FALCON
from jaxserve.models.family import Family
from jaxserve.models.fields import Fields
from jaxserve.models.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_VISION
from jaxserve.models.gemma4 import GEMMA4, GEMMA4_UNIFIED_VISION, GEMMA4_VISION
from jaxserve.models.glm import GLM4, GLM4_LITE, GLM4_MOE
from jaxserve.models.gpt2 import GPT2
from jaxserve.models.gpt_oss import GPT_OSS
from jaxserve.models.granite import GRANITE
from jaxserve.models.granite_hybrid import GRANITE_HYBRID
from jaxserve.models.hf_config import RawConfig
from jaxserve.models.internlm import INTERNLM, INTERNLM2
from jaxserve.models.llama import LLAMA, MISTRAL
from jaxserve.models.llama4 import LLAMA4, LLAMA4_VISION
from jaxserve.models.minicpm import MINICPM3
from jaxserve.models.ministral import MINISTRAL3, MISTRAL3
from jaxserve.models.mixtral import MIXTRAL, PHIMOE
from jaxserve.models.olmo import EXAONE4, OLMO2, OLMO3
from jaxserve.models.phi3 import PHI3
from jaxserve.models.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from jaxserve.models.qwen_hybrid import (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_MOE_VISION,
    QWEN3_5_VISION,
    QWEN3_NEXT,
)
from jaxserve.models.seed_oss import SEED_OSS
from jaxserve.models.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4_VISION,
    "MistralForCausalLM": MISTRAL,
    "Ministral3ForCausalLM": MINISTRAL3,
    "Mistral3ForConditionalGeneration": MISTRAL3,
    "MixtralForCausalLM": MIXTRAL,
    "SmolLM3ForCausalLM": SMOLLM3,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "Exaone4ForCausalLM": EXAONE4,
    "Glm4ForCausalLM": GLM4,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Glm4MoeLiteForCausalLM": GLM4_LITE,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "KimiK25ForConditionalGeneration": KIMI_VISION,
    "YoutuForCausalLM": YOUTU,
    "MiniCPM3ForCausalLM": MINICPM3,
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeHybridForCausalLM": GRANITE_HYBRID,
    "SeedOssForCausalLM": SEED_OSS,
    "Cohere2ForCausalLM": COHERE2,
    "InternLMForCausalLM": INTERNLM,
    "InternLM2ForCausalLM": INTERNLM2,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5ForConditionalGeneration": QWEN3_5_VISION,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": QWEN3_5_MOE_VISION,
    "FalconForCausalLM": FALCON,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_VISION,
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4ForConditionalGeneration": GEMMA4_VISION,
    "Gemma4UnifiedForConditionalGeneration": GEMMA4_UNIFIED_VISION,
    "Phi3ForCausalLM": PHI3,
    "PhiMoEForCausalLM": PHIMOE,  # the hub's name; below, transformers'
    "PhimoeForCausalLM": PHIMOE,
    "GptOssForCausalLM": GPT_OSS,
    "GPT2LMHeadModel": GPT2,
}


def family_of(architecture: str) -> Family:
    """What serves ``architecture``; ModelError names the one with the nearest name and lists all."""
    if architecture not in FAMILIES:
        nearest = difflib.get_close_matches(architecture, FAMILIES, n=1, cutoff=0)
        raise ModelError(
            f"architecture {architecture!r} is not supported; nearest: {nearest[0]!r}; supported: {', '.join(FAMILIES)}"
        )
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
