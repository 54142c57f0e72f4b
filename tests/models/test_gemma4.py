"""Models whose layers keep keys and values of two shapes, or read those of earlier layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ModelError
from tests.models.company import check_company, make
from tests.models.golden import Golden

SHARED, EXPERTS = Golden("gemma4_shared"), Golden("gemma4_experts")


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
    check_company(golden, tiny_tokenizer, settings, caches_prefixes=True)


def test_layers_that_read_others_keys_take_no_memory(tiny_tokenizer: Path) -> None:
    """Of six layers the first two have two heads of 16 in the cache, the third two of 32, and the others nothing."""
    with make(SHARED, tiny_tokenizer, warmup=False) as llm:
        assert llm.engine.runner.block_bytes == 2 * 8 * (2 * 2 * 16 + 2 * 32) * 4


def test_a_stage_cannot_read_anothers_keys(tiny_tokenizer: Path) -> None:
    message = "pipeline_parallel 2 puts layers 0 and 3 into the same place of two stages, but they differ in .*qkv"
    with pytest.raises(ModelError, match=message):
        make(SHARED, tiny_tokenizer, pipeline_parallel=2)
