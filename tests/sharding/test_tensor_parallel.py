"""Tensor parallelism on virtual devices: the same tokens as transformers, two all-reduces a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.programs import StepPrograms
from jaxserve.errors import ConfigError, ModelError
from jaxserve.evaluation.compiled import collectives
from jaxserve.models.config import ModelConfig, Rope
from jaxserve.sampling_params import SamplingParams
from jaxserve.sharding.mesh import make_mesh
from tests.models.golden import Golden

LLAMA = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=8,
    num_kv_heads=2, head_dim=8, max_position_embeddings=64, norm_eps=1e-5, rope=Rope(theta=1e4, dim=8),
)  # fmt: skip


def serve(engine: Engine, prompts: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for name, prompt in zip(outputs, prompts, strict=True):
        engine.add_request(name, prompt, params)
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id] += delta.token_ids
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine.compiles.count == 0
    return list(outputs.values())


CASES = [
    ("yi_gqa", 8), ("llama_mha_untied", 4), ("llama_gqa_wide_heads", 4), ("llama_mqa_bias", 4), ("mistral_window", 2),
    ("qwen2_bias", 4), ("qwen3_qknorm", 4), ("mixtral_top2", 2), ("qwen3_moe", 2), ("gemma2_softcap", 2),
    ("gemma_mqa", 4), ("falcon_40b", 4), ("falcon_7b", 4), ("phi3_fused", 4), ("internlm2_gqa", 4), ("gpt2_learned", 2),
    ("olmo2_norms", 4), ("glm4_moe_groups", 2), ("cohere2_parallel", 4), ("gpt_oss_sinks", 4),
]  # fmt: skip
"""Each with more devices than KV heads where its query heads allow it."""


@pytest.mark.parametrize(("name", "tensor"), CASES)
def test_families_give_the_tokens_of_transformers(name: str, tensor: int, tiny_tokenizer: Path) -> None:
    """Two requests that share nothing, in a cache that does not hold both, so that one is preempted on the way."""
    golden = Golden(name)
    config = EngineConfig(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), tensor_parallel=tensor, token_budget=16,
        max_num_seqs=2, max_model_len=golden.length + 1, block_size=8, num_blocks=2 + -(-(golden.length + 1) // 8),
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = Engine(config, show_progress=False)
    assert serve(engine, [golden.prompt] * 2, len(golden.greedy)) == [golden.greedy] * 2
    engine.close()


def programs(model: ModelConfig, tensor: int, **settings: object) -> StepPrograms:
    config = EngineConfig(token_budget=16, max_num_seqs=4, max_model_len=64, tensor_parallel=tensor, num_blocks=20)
    resolved = dataclasses.replace(config, **settings).resolve(model_max_len=64, on_gpu=False)
    return StepPrograms(resolved, model, make_mesh(tensor))


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_two_all_reduces_a_layer_and_nothing_gathered(tensor: int) -> None:
    """With 4 and 8 devices each of the two KV heads is held several times."""
    counts = []
    for num_layers in (2, 5):
        model = dataclasses.replace(LLAMA, num_layers=num_layers)
        text = programs(model, tensor).lower_forward(16).compile().as_text()
        assert collectives(text, "run_layer") == {"all-reduce": 2 * num_layers}
        counts.append(collectives(text))
    assert counts[1] - counts[0] == {"all-reduce": 2 * 3}


def test_what_does_not_divide_is_named() -> None:
    with pytest.raises(ModelError, match="num_heads of 8 does not divide over tensor_parallel 3"):
        programs(LLAMA, 3)
    with pytest.raises(ModelError, match="num_kv_heads of 6 does not divide over tensor_parallel 4"):
        programs(dataclasses.replace(LLAMA, num_heads=12, num_kv_heads=6), 4)
    with pytest.raises(ModelError, match="embedding: dimension 'vocab' of 255 does not divide over 2 devices"):
        programs(dataclasses.replace(LLAMA, vocab_size=255), 2)
    with pytest.raises(ConfigError, match=f"tensor_parallel must not exceed the {len(jax.devices())} devices, got 64"):
        make_mesh(64)
