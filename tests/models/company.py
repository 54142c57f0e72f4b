"""Requests that share an engine, for models that keep something else of a sequence than most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams
from tests.models.golden import Golden


def make(golden: Golden, tokenizer: Path, **settings: Any) -> LLM:
    """A tiny engine."""
    defaults = {
        "token_budget": 16, "max_num_seqs": 3, "block_size": 8, "num_blocks": 40, "max_model_len": golden.length,
    }  # fmt: skip
    return LLM(model=str(golden.checkpoint), tokenizer=str(tokenizer), show_progress=False, **{**defaults, **settings})


def check_company(golden: Golden, tokenizer: Path, settings: dict[str, Any], *, caches_prefixes: bool) -> None:
    """Prompts, some equal, give together what each gives alone, one of them what transformers does; those are
    preempted that have few blocks, and nothing is left behind."""
    greedy = SamplingParams(temperature=0, max_tokens=len(golden.greedy), ignore_eos=True)
    prompts = [golden.prompt, golden.prompt[:7], golden.prompt, [5], golden.prompt[3:], golden.prompt]
    with make(golden, tokenizer, **settings) as llm:
        alone = [llm.generate([prompt], greedy)[0].outputs[0].token_ids for prompt in prompts]
        together = llm.generate(prompts, greedy)
        assert [output.outputs[0].token_ids for output in together] == alone
        assert alone[0] == golden.greedy
        assert any(output.metrics.num_preemptions for output in together) == ("num_blocks" in settings)
        assert any(output.metrics.num_cached_tokens for output in together) == caches_prefixes
        assert llm.engine.compiles.count == 0
        llm.engine.blocks.check()
        assert llm.engine.blocks.num_used == 0
