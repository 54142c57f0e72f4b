"""Pipeline parallelism on virtual devices: the same tokens as transformers, whatever is in flight."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.ticks import TickPrograms
from jaxserve.metrics import StepRecord
from jaxserve.models.config import Experts, ModelConfig, ModelError
from jaxserve.request import RequestDelta, SamplingParams
from jaxserve.scheduler import Chunk
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.pipeline import Stages
from tests.models.golden import Golden
from tests.sharding.test_tensor_parallel import LLAMA, serve

SMOLLM2 = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def drain(engine: Engine) -> list[RequestDelta]:
    deltas = []
    while engine.has_unfinished():
        deltas += engine.step()
    engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine.compiles.count == 0
    return deltas


CASES = [
    ("yi_gqa", 2, 1), ("yi_gqa", 2, 4), ("llama_mha_untied", 2, 2), ("mistral_window", 2, 1), ("mixtral_top2", 2, 2),
    ("gemma2_softcap", 2, 1), ("gemma3_local", 2, 1), ("gemma3_local", 2, 2), ("falcon_7b", 2, 2), ("gpt2_learned", 2, 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pipe", "tensor"), CASES)
def test_families_give_the_tokens_of_transformers(name: str, pipe: int, tensor: int, tiny_tokenizer: Path) -> None:
    """Three requests in a cache that does not hold them all, so that some are preempted while a token is in flight."""
    golden = Golden(name)
    config = EngineConfig(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), pipeline_parallel=pipe, tensor_parallel=tensor,
        token_budget=16, max_num_seqs=3,
        max_model_len=golden.length + 1, block_size=8, num_blocks=2 + -(-(golden.length + 1) // 8),
    )  # fmt: skip
    engine = Engine(config, show_progress=False)
    assert serve(engine, [golden.prompt] * 3, len(golden.greedy)) == [golden.greedy] * 3
    assert engine.metrics.registry.get_sample_value("jaxserve_num_preemptions_total")
    engine.close()
