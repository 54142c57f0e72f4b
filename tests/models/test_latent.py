"""Models that attend over latents: what is kept of a token, in company, on several devices; what cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxserve.errors import ModelError
from jaxserve.kernels.cache import KVCacheShape
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.presets import PRESETS
from jaxserve.models.registry import read_config
from jaxserve.simulator.cost import RooflineCost
from jaxserve.simulator.devices import A100_80G
from tests.models.company import check_company, make
from tests.models.golden import Golden

V2, V3 = map(Golden, ("deepseek_v2_groups", "deepseek_v3_groups"))
LARGE = {
    "num_attention_heads": 128, "hidden_size": 5120, "num_hidden_layers": 60, "n_routed_experts": 160,
}  # fmt: skip
"""Of DeepSeek-V2."""


def kept(config: ModelConfig) -> KVCacheShape:
    return KVCacheShape(
        config.num_layers, config.num_kv_heads, config.head_dim, 64, jnp.dtype("bfloat16"),
        has_values=config.has_values,
    )  # fmt: skip


def test_bytes_of_a_token() -> None:
    """As arXiv 2405.04434 counts numbers in appendix D, of models of 27 and of 60 layers: 15.6 and 34.6 thousand."""
    lite = open_checkpoint("deepseek-v2-lite", "dummy").config
    large = read_config(PRESETS["deepseek-v2-lite"] | LARGE)
    for config, numbers in ((lite, 15_552), (large, 34_560)):
        assert config.num_layers * (512 + 64) == numbers
        assert kept(config).block_bytes == 64 * 2 * numbers
        assert RooflineCost(config, A100_80G).kv_bytes_per_token == 2 * numbers


@pytest.mark.parametrize(
    ("golden", "settings"),
    [
        (V3, {"num_blocks": 11}),
        (V2, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        (V3, {"speculative": "ngram", "swap_space_bytes": 2**20}),
    ],
    ids=["preempted", "two of each", "drafts and swap"],
)
def test_company_does_not_matter(golden: Golden, tiny_tokenizer: Path, settings: dict[str, Any]) -> None:
    """Prompts share blocks, and the cache has what transformers' greedy continuation needs, wherever chunks are cut."""
    check_company(golden, tiny_tokenizer, settings, caches_prefixes=True)


def test_dense_and_sparse_layers_in_a_pipeline(tiny_tokenizer: Path) -> None:
    with pytest.raises(ModelError, match="puts layers 0 and 1 into the same place of two stages, but they differ in"):
        make(V3, tiny_tokenizer, pipeline_parallel=2)


@pytest.mark.parametrize(
    ("golden", "change", "message"),
    [
        (V3, {"index_topk": 2048}, "index_topk 2048: sparse attention, whose keys an indexer chooses"),
        (V3, {"architectures": ["DeepseekV32ForCausalLM"]}, "'DeepseekV32ForCausalLM' is not supported; nearest: 'D"),
        (V3, {"attention_bias": True}, "attention_bias True is not supported; supported: False"),
        (V3, {"scoring_func": "softmax"}, "scoring_func must be one of sigmoid, found 'softmax'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq must be 1, found 2"),
        (V3, {"kv_lora_rank": None}, "kv_lora_rank must be an integer in .*, found None"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob True is not supported; supported: False"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method must be one of greedy, group_limited_greedy, found 'noaux_tc'"),
        (
            Golden("glm4_moe_lite_latent"), {"mlp_layer_types": ["dense"]},
            "mlp_layer_types must be 2 of dense and sparse, found \\['dense'\\]",
        ),
    ],
)  # fmt: skip
def test_config_that_cannot_be_served(golden: Golden, change: dict[str, Any], message: str) -> None:
    raw = json.loads((golden.checkpoint / "config.json").read_text())
    with pytest.raises(ModelError, match=message):
        read_config(raw | change)
