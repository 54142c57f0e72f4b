"""Models whose memory of a sequence is partly in no page: preemptions, company, two devices, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from tests.models.company import check_company, make
from tests.models.golden import Golden

QWEN, GRANITE = Golden("qwen3_5_hybrid"), Golden("granite4_hybrid")


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
    check_company(golden, tiny_tokenizer, settings, caches_prefixes=False)


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
