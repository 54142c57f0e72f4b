"""Every family against transformers (tests/golden): logits whatever the chunking, and greedy outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ModelError
from jaxserve.models.decoder import Decoder
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.registry import FAMILIES, read_config
from jaxserve.scheduler import POLICIES
from tests.models.golden import SAME_AS, XLA, Golden, names

TOLERANCE = 6e-4
"""Two float32 implementations differ by up to 7e-5 here, and by 3e-4 where states carry the errors of all tokens, as
transformers itself does in float64; exact GELU for its tanh form would differ by 1e-3."""


@pytest.mark.parametrize("name", names())
def test_logits_match_transformers(name: str) -> None:
    golden = Golden(name)
    model = golden.load()
    assert np.abs(golden.logits).max() > 1, "a reference this flat would prove little"
    for chunking, sizes in golden.chunkings().items():
        error, same_greedy = golden.compare(model, sizes)
        assert error < TOLERANCE, chunking
        assert same_greedy, chunking


@pytest.mark.parametrize(
    "name", ["gemma2_softcap", "gpt_oss_sinks", "qwen3_5_hybrid", "deepseek_v3_groups", "gemma4_shared"]
)
def test_plain_xla_gives_the_same(name: str) -> None:
    """What machines without a compiler run. tests/kernels has its parts, of every kind."""
    golden = Golden(name)
    error, same_greedy = golden.compare(golden.load(), golden.chunkings()["chunks"], XLA)
    assert error < TOLERANCE
    assert same_greedy


@pytest.mark.parametrize("architecture", sorted(FAMILIES.keys() - SAME_AS.keys()))
def test_engine_serves_every_architecture(architecture: str, tiny_tokenizer: Path) -> None:
    golden = next(g for g in map(Golden, names()) if g.architecture == architecture)
    with LLM(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), show_progress=False, token_budget=16,
        max_num_seqs=2, block_size=8, num_blocks=24, max_model_len=golden.length,
    ) as llm:  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=len(golden.greedy), ignore_eos=True)
        first, second = llm.generate([golden.prompt, golden.prompt[:20]], greedy)
        llm.engine.blocks.check()
        assert llm.engine.blocks.num_used == 0
    assert list(first.outputs[0].token_ids) == golden.greedy
    assert len(second.outputs[0].token_ids) == len(golden.greedy)


@pytest.mark.parametrize("scheduler", POLICIES)
def test_outputs_do_not_depend_on_the_policy(scheduler: str, tiny_tokenizer: Path) -> None:
    """With memory for little more than one request, so that most policies preempt, and a window that frees blocks."""
    golden = Golden("mistral_window")
    with LLM(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), show_progress=False, token_budget=golden.length,
        max_num_seqs=4, block_size=8, num_blocks=2 + -(-golden.length // 8), max_model_len=golden.length,
        scheduler=scheduler, slo_tbt_seconds=100.0,
    ) as llm:  # fmt: skip
        greedy = SamplingParams(temperature=0, max_tokens=len(golden.greedy), ignore_eos=True)
        outputs = llm.generate([golden.prompt] * 4, greedy, use_tqdm=False)
        assert llm.engine.blocks.num_used == llm.engine.compiles.count == 0
    assert [output.outputs[0].token_ids for output in outputs] == [golden.greedy] * 4


def test_layers_of_one_structure_share_a_trace() -> None:
    """Start-up depends on it: every layer but the first of its structure must hit the cache of the jitted layer."""
    for name, structures in (("llama_gqa_tied", 1), ("gemma2_softcap", 2)):
        config = open_checkpoint(str(Golden(name).checkpoint)).config
        model = Decoder(config, max_len=64, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        assert len({nnx.split(layer)[0] for layer in model.layers}) == structures < len(model.layers)


def test_every_family_has_a_golden() -> None:
    served = {Golden(name).architecture for name in names()}
    assert FAMILIES.keys() - served == SAME_AS.keys()


DEFAULTS = {
    "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe", "FalconForCausalLM": "falcon",
    "GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3", "GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3", "Ministral3ForCausalLM": "ministral3", "Olmo3ForCausalLM": "olmo3",
    "Exaone4ForCausalLM": "exaone4", "Glm4ForCausalLM": "glm4", "Glm4MoeForCausalLM": "glm4_moe",
    "GraniteForCausalLM": "granite", "SeedOssForCausalLM": "seed_oss", "Cohere2ForCausalLM": "cohere2",
    "Qwen2MoeForCausalLM": "qwen2_moe", "PhimoeForCausalLM": "phimoe", "Llama4ForCausalLM": "llama4_text",
    "DeepseekV2ForCausalLM": "deepseek_v2", "DeepseekV3ForCausalLM": "deepseek_v3", "YoutuForCausalLM": "youtu",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite", "MiniCPM3ForCausalLM": "minicpm3",
    "GptOssForCausalLM": "gpt_oss", "Qwen3NextForCausalLM": "qwen3_next", "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text", "Gemma4ForCausalLM": "gemma4_text",
}  # fmt: skip


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """A config.json that leaves out what it may means the same as the one that transformers would write for it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    needed: dict[str, Any] = {
        "architectures": [architecture], "vocab_size": 64, "hidden_size": 128, "intermediate_size": 80,
        "num_hidden_layers": 8, "num_attention_heads": 32,
    }  # fmt: skip
    if architecture == "GPT2LMHeadModel":
        needed = {"architectures": [architecture], "vocab_size": 64, "n_embd": 64, "n_layer": 8, "n_head": 4}
    if architecture == "DeepseekV2ForCausalLM":
        needed["num_experts_per_tok"] = 2  # transformers has none by default
    written = json.loads(CONFIG_MAPPING[DEFAULTS[architecture]](**needed).to_json_string(use_diff=False))
    assert read_config(needed) == read_config(written)


@pytest.mark.parametrize(("architecture", "same"), SAME_AS.items())
def test_architectures_that_are_anothers(architecture: str, same: str) -> None:
    golden = next(g for g in map(Golden, names()) if g.architecture == same)
    raw = json.loads((golden.checkpoint / "config.json").read_text())
    nested = FAMILIES[architecture].nested
    whole = {**(raw if nested is None else {nested: raw, "vision_config": {}}), "architectures": [architecture]}
    ours, theirs = read_config(whole), read_config(raw)
    assert {**vars(ours), "architecture": ""} == {**vars(theirs), "architecture": ""}


@pytest.mark.parametrize("architecture", [name for name in SAME_AS if FAMILIES[name].nested])
def test_tensors_of_models_that_can_see(architecture: str) -> None:
    rename = FAMILIES[architecture].tensor_name
    for theirs in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
        assert rename(theirs) == "model.norm.weight"
    assert rename("language_model.lm_head.weight") == "lm_head.weight"
    for theirs in ("vision_tower.encoder.weight", "model.vision_tower.x", "multi_modal_projector.norm.weight"):
        assert rename(theirs) is None


def test_layers_that_guess_further_tokens_are_left_out() -> None:
    golden = Golden("glm4_moe_groups")
    config = open_checkpoint(str(golden.checkpoint)).config
    name_of = FAMILIES[config.architecture].names_for(config)
    assert name_of(f"model.layers.{config.num_layers}.eh_proj.weight") is None
    for name in ("model.layers.1.input_layernorm.weight", "model.norm.weight"):
        assert name_of(name) == name


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "'MambaForCausalLM' is not supported; nearest: 'LlamaForCausalLM'; supported: LlamaForCausalLM, ",
        ),
        (
            {"architectures": ["Mixtral2ForCausalLM"]},
            "'Mixtral2ForCausalLM' is not supported; nearest: 'MixtralForCausalLM'; supported: ",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]},
            r"no_rope_layers must be a list of at least 2 numbers, found \[1\]",
        ),
        (
            {"architectures": ["PhimoeForCausalLM"], "num_experts_per_tok": 3},
            "experts per token must be 2 with the router sparse_mixer, got 3",
        ),
        (
            {"architectures": ["Glm4MoeForCausalLM"], "n_group": 3},
            "128 experts in 3 groups, 1 of them a token, is not possible",
        ),
        (
            {"architectures": ["Glm4MoeForCausalLM"], "n_group": 32},
            "experts per token must be at most 4, its groups' experts, got 8",
        ),
        ({"architectures": ["FalconForCausalLM"], "alibi": True}, "alibi True is not supported; supported: False"),
        ({"architectures": ["FalconForCausalLM"], "parallel_attn": False}, "parallel_attn False is not supported"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["linear_attention"] * 2},
            "layer_types linear_attention not supported; supported: full_attention, sliding_attention",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]},
            "layer_types must name 2 layers, found 1",
        ),
        (
            {"architectures": ["Phi3ForCausalLM"], "sliding_window": 0},
            r"sliding_window must be an integer in \[1, .*found 0",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9},
            r"experts per token must be in \[1, 8\], got 9",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported",
        ),
        (
            {"architectures": ["Gemma4ForCausalLM"], "use_bidirectional_attention": "all"},
            "use_bidirectional_attention must be vision or null, found 'all'",
        ),
        ({"architectures": ["Gemma4ForCausalLM"], "attention_bias": True}, "attention_bias True is not supported"),
        (
            {"architectures": ["Gemma4ForCausalLM"], "per_layer_config": {"0": {"head_dim": 64}}},
            "per_layer_config must be the same of all layers of full_attention, and of no others, found",
        ),
        (
            {"architectures": ["Gemma4ForCausalLM"], "num_kv_shared_layers": 1},
            "num_kv_shared_layers must leave layers of every kind, got 1 of 2",
        ),
        (
            {"architectures": ["Gemma4ForCausalLM"], "vocab_size_per_layer_input": 4},
            "vocab_size_per_layer_input must be at least vocab_size 8, found 4",
        ),
    ],
)
def test_config_that_cannot_be_served(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_config(LLAMA | change)


def test_the_table_of_models_is_in_step() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    absent = [name for name in (*FAMILIES, *names()) if f" {name} " not in table.replace(",", " ")]
    assert not absent, "run python -m tests.models.make_table"
    assert "**no**" not in table
