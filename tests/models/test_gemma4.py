"""Models whose layers keep keys and values of two shapes, or read those of earlier layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ModelError
from tests.models.golden import Golden

SHARED, EXPERTS = Golden("gemma4_shared"), Golden("gemma4_experts")
GREEDY = SamplingParams(temperature=0, max_tokens=len(SHARED.greedy), ignore_eos=True)


def make(golden: Golden, tokenizer: Path, **settings: Any) -> LLM:
    defaults = {
        "token_budget": 16, "max_num_seqs": 3, "block_size": 8, "num_blocks": 40, "max_model_len": golden.length,
    }  # fmt: skip
    return LLM(model=str(golden.checkpoint), tokenizer=str(tokenizer), show_progress=False, **{**defaults, **settings})


@pytest.mark.parametrize(
    ("golden", "settings"),
    [
        (SHARED, {"num_blocks": 9}),
        (EXPERTS, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
    ids=["preempted", "devices and stages"],
)
def test_company_does_not_matter(golden: Golden, tiny_tokenizer: Path, settings: dict[str, Any]) -> None:
    """Blocks of both kinds of layers come and go together, are shared by equal prompts, and lie on several devices."""
    prompts = [golden.prompt, golden.prompt[:7], golden.prompt, [5], golden.prompt[3:]]
    with make(golden, tiny_tokenizer, **settings) as llm:
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
        together = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in together] == alone
        assert alone[0] == golden.greedy
        assert any(output.metrics.num_preemptions for output in together) == ("num_blocks" in settings)
        assert any(output.metrics.num_cached_tokens for output in together)
        assert llm.engine.compiles.count == 0
        llm.engine.blocks.check()
        assert llm.engine.blocks.num_used == 0


def test_layers_that_read_others_keys_take_no_memory(tiny_tokenizer: Path) -> None:
    """Of six layers the first two have two heads of 16 in the cache, the third two of 32, and the others nothing."""
    with make(SHARED, tiny_tokenizer, warmup=False) as llm:
        assert llm.engine.runner.block_bytes == 2 * 8 * (2 * 2 * 16 + 2 * 32) * 4


def test_a_stage_cannot_read_anothers_keys(tiny_tokenizer: Path) -> None:
    message = "pipeline_parallel 2 puts layers 0 and 3 into the same place of two stages, but they differ in .*qkv"
    with pytest.raises(ModelError, match=message):
        make(SHARED, tiny_tokenizer, pipeline_parallel=2)
