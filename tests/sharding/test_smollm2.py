"""SmolLM2, of 9 heads, 3 KV heads and 30 layers, divided over a few virtual devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.scheduler import Chunk
from tests.sharding.test_tensor_parallel import serve

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())
NUM_TOKENS = 16
CASES = [c for c in GOLDEN["cases"] if len(c["prompt_token_ids"]) <= 40 and len(c["output_token_ids"]) >= NUM_TOKENS]


@pytest.mark.parametrize(("tensor", "pipe"), [(3, 2)])
def test_tokens_are_those_of_transformers(tensor: int, pipe: int) -> None:
    """In a cache that does not hold all requests, so that some are preempted on the way. Chunks of a prompt follow each
    other through the stages of a pipeline.
    """
    config = EngineConfig(
        tensor_parallel=tensor, pipeline_parallel=pipe, token_budget=16, max_num_seqs=8, max_model_len=64, num_blocks=8
    )
    engine = Engine(config, show_progress=False)
    chunks: list[list[Chunk]] = []
    engine.on_step.append(lambda record, served: chunks.append(served))
    outputs = serve(engine, [case["prompt_token_ids"] for case in CASES], NUM_TOKENS)
    assert outputs == [case["output_token_ids"][:NUM_TOKENS] for case in CASES]
    assert engine.metrics.registry.get_sample_value("jaxserve_num_preemptions_total")
    engine.close()
    long = max(range(len(CASES)), key=lambda i: len(CASES[i]["prompt_token_ids"]))
    first, second, *_ = (i for i, served in enumerate(chunks) for c in served if c.request.request_id == str(long))
    assert second == first + 1, "in consecutive ticks"
