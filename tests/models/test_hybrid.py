"""Models whose memory of a sequence is partly in no page: preemptions, company, two devices, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError
from tests.models.golden import Golden

GOLDEN = Golden("qwen3_5_hybrid")
GREEDY = SamplingParams(temperature=0, max_tokens=len(GOLDEN.greedy), ignore_eos=True)


def make(tokenizer: Path, **settings: Any) -> LLM:
    defaults = {
        "token_budget": 16, "max_num_seqs": 3, "block_size": 8, "num_blocks": 40, "max_model_len": GOLDEN.length,
    }  # fmt: skip
    return LLM(model=str(GOLDEN.checkpoint), tokenizer=str(tokenizer), show_progress=False, **{**defaults, **settings})


@pytest.mark.parametrize(
    "settings",
    [{"num_blocks": 11}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}],
    ids=["preempted", "two devices", "two stages"],
)
def test_company_does_not_matter(tiny_tokenizer: Path, settings: dict[str, Any]) -> None:
    """Slots change their owners, chunks are cut anywhere, and who is preempted begins again."""
    prompts = [GOLDEN.prompt, GOLDEN.prompt[:7], GOLDEN.prompt, [5], GOLDEN.prompt[3:], GOLDEN.prompt]
    with make(tiny_tokenizer, **settings) as llm:
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
        together = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in together] == alone
        assert alone[0] == GOLDEN.greedy
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
        make(tiny_tokenizer, **settings)
