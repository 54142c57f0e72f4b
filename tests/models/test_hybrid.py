"""Models whose memory of a sequence is partly in no page: preemptions, company, two devices, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError
from tests.models.golden import Golden

QWEN, GRANITE = Golden("qwen3_5_hybrid"), Golden("granite4_hybrid")
GREEDY = SamplingParams(temperature=0, max_tokens=len(QWEN.greedy), ignore_eos=True)


def make(golden: Golden, tokenizer: Path, **settings: Any) -> LLM:
    defaults = {
        "token_budget": 16, "max_num_seqs": 3, "block_size": 8, "num_blocks": 40, "max_model_len": golden.length,
    }  # fmt: skip
    return LLM(model=str(golden.checkpoint), tokenizer=str(tokenizer), show_progress=False, **{**defaults, **settings})


@pytest.mark.parametrize(
    ("golden", "settings"),
    [
        (QWEN, {"num_blocks": 11}),
        (QWEN, {"tensor_parallel": 2, "pipeline_parallel": 2}),
        (GRANITE, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
    ids=["preempted", "delta_net", "mamba2"],
)
def test_company_does_not_matter(golden: Golden, tiny_tokenizer: Path, settings: dict[str, Any]) -> None:
    """Slots change their owners, chunks are cut anywhere, and who is preempted begins again."""
    prompts = [golden.prompt, golden.prompt[:7], golden.prompt, [5], golden.prompt[3:], golden.prompt]
    with make(golden, tiny_tokenizer, **settings) as llm:
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
        together = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in together] == alone
        assert alone[0] == golden.greedy
        assert any(output.metrics.num_preemptions for output in together) == ("num_blocks" in settings)
        assert llm.engine.compiles.count == 0
        llm.engine.blocks.check()
        assert llm.engine.blocks.num_used == 0
        assert not any(output.metrics.num_cached_tokens for output in together)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative": "ngram"}, "speculative must be off for a model with recurrent layers, got ngram"),
        ({"swap_space_bytes": 2**20}, "swap_space_bytes must be 0 for a model with recurrent layers, got 1048576"),
    ],
)
def test_what_would_go_back(tiny_tokenizer: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(QWEN, tiny_tokenizer, **settings)
