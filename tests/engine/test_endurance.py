"""A thousand steps in each way of dividing a model: nothing compiles, and the host's memory does not grow."""

from __future__ import annotations

import gc
import itertools
import random
from pathlib import Path

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.sampling_params import SamplingParams
from tests.models.golden import Golden

NUM_STEPS, WARM_UP_STEPS = 1000, 300
GROWTH_BYTES = 6 * 2**20
"""What the allocator may keep besides; a leak of 10 KB a step would be more."""


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize(("tensor", "pipe"), [(1, 1), (2, 2)])
def test_a_thousand_steps(tensor: int, pipe: int, tiny_tokenizer: Path) -> None:
    """Requests come and go all the time: sampled, with logprobs of both kinds, aborted, preempted."""
    golden = Golden("yi_gqa")
    config = EngineConfig(
        model=str(golden.checkpoint), tokenizer=str(tiny_tokenizer), tensor_parallel=tensor, pipeline_parallel=pipe,
        token_budget=32, max_num_seqs=4, max_model_len=golden.length + 1, block_size=8, num_blocks=14,
    )  # fmt: skip
    engine = Engine(config, show_progress=False)
    assert engine.runner.has_rare(timeout_seconds=300)  # what compiles in the background takes memory too
    chance, names = random.Random(0), itertools.count()
    live: list[str] = []
    before = 0
    for step in range(NUM_STEPS):
        if step == WARM_UP_STEPS:
            before = resident_bytes()
        while len(live) < 6:
            live.append(str(next(names)))
            params = SamplingParams(
                temperature=chance.choice([0.0, 1.0]), max_tokens=chance.randint(1, 12), ignore_eos=True,
                logprobs=chance.choice([None, None, 2]), prompt_logprobs=chance.choice([None, None, None, 1]),
            )  # fmt: skip
            engine.add_request(live[-1], golden.prompt[: chance.randint(1, len(golden.prompt))], params)
        if chance.random() < 0.02:
            engine.abort(chance.choice(live))
        for delta in engine.step():
            if delta.finish_reason is not None:
                live.remove(delta.request_id)
    grown = resident_bytes() - before
    print(f"tensor {tensor}, pipe {pipe}: {next(names)} requests, {grown / 2**20:.2f} MiB more after {NUM_STEPS} steps")
    assert grown < GROWTH_BYTES
    assert engine.compiles.count == 0
    assert engine.metrics.registry.get_sample_value("jaxserve_num_preemptions_total")
    engine.close()
