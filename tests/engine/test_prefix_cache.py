"""Outputs with the prefix cache are those without: alone, in a pipeline and in windows, whatever is preempted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.request import RequestMetrics
from jaxserve.sampling_params import SamplingParams
from tests.models.golden import Golden

BLOCK_SIZE, MAX_LEN = 8, 112
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
numbers = count()


def tokens(num_tokens: int) -> list[int]:
    """At random, and never the same."""
    return np.random.default_rng(next(numbers)).integers(3, 96, num_tokens).tolist()


@pytest.fixture(
    scope="module", params=[("yi_gqa", 1), ("yi_gqa", 2), ("mistral_window", 1)], ids="{0[0]}-{0[1]}".format
)
def engine(request: pytest.FixtureRequest, tiny_tokenizer: Path) -> Iterator[Engine]:
    """Idle before and after every test; its memory holds little more than two of the longest sequences."""
    name, stages = request.param
    config = EngineConfig(
        model=str(Golden(name).checkpoint), tokenizer=str(tiny_tokenizer), pipeline_parallel=stages, token_budget=16,
        max_num_seqs=4, max_model_len=MAX_LEN, block_size=BLOCK_SIZE, num_blocks=1 + 30,
    )  # fmt: skip
    engine = Engine(config, show_progress=False)
    yield engine
    engine.close()


def serve(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[tuple[list[int], RequestMetrics]]:
    """Output and metrics of all prompts at once."""
    names = [str(next(numbers)) for _ in prompts]
    outputs, metrics = {name: list[int]() for name in names}, dict[str, RequestMetrics]()
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, params)
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id] += delta.token_ids
            metrics[delta.request_id] = delta.metrics
        engine.blocks.check()
    assert engine.blocks.num_used == 0
    assert engine.compiles.count == 0
    return [(outputs[name], metrics[name]) for name in names]


def uncached(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    """What comes of a prompt where nothing can be found of it."""
    ((output, metrics),) = serve(engine, [prompt], replace(params, cache_salt=f"alone {next(numbers)}"))
    assert metrics.num_cached_tokens == 0
    return output


def test_a_shared_beginning(engine: Engine) -> None:
    """Sixteen at once, some in one batch, then once more."""
    beginning = tokens(45)
    prompts = [beginning + tokens(1 + index) for index in range(16)]
    want = [uncached(engine, prompt) for prompt in prompts]
    first, second = serve(engine, prompts, GREEDY), serve(engine, prompts, GREEDY)
    assert [output for output, _ in first] == want
    assert [output for output, _ in second] == want
    assert all(metrics.num_cached_tokens >= 40 for _, metrics in first[1:])


def test_a_chat(engine: Engine) -> None:
    chat = tokens(20)
    for _ in range(3):
        want = uncached(engine, chat)
        ((output, metrics),) = serve(engine, [chat], GREEDY)
        assert output == want
        assert len(chat) == 20 or metrics.num_cached_tokens == (len(chat) - 6) // BLOCK_SIZE * BLOCK_SIZE
        # The cache has all but the last token of the output; the next turn adds some.
        chat = chat + output + tokens(5)


def test_preempted_requests(engine: Engine) -> None:
    prompts = [tokens(40) for _ in range(4)]
    params = replace(GREEDY, max_tokens=70)
    want = [uncached(engine, prompt, params) for prompt in prompts]
    served = serve(engine, prompts, params)
    assert [output for output, _ in served] == want
    windowed = engine.scheduler.limits.window is not None
    assert windowed != any(metrics.num_preemptions for _, metrics in served)


def test_the_second_time_only_the_last_block_is_computed(engine: Engine) -> None:
    def value(name: str) -> float:
        return engine.metrics.registry.get_sample_value(f"jaxserve_{name}_total") or 0.0

    prompt, params = tokens(96), replace(GREEDY, max_tokens=1)
    (first,) = serve(engine, [prompt], params)
    names = "step_tokens", "prefix_cache_queries", "prefix_cache_hits", "prompt_tokens"
    before = [value(name) for name in names]
    (second,) = serve(engine, [prompt], params)
    assert second[0] == first[0]
    assert [value(name) - was for name, was in zip(names, before, strict=True)] == [BLOCK_SIZE, 96, 88, 96]


def test_logprobs_of_a_prompt_that_others_have_left(engine: Engine) -> None:
    """They need every row of it, whatever the cache has."""
    prompt = tokens(50)
    serve(engine, [prompt], GREEDY)
    engine.add_request("scored", prompt, replace(GREEDY, prompt_logprobs=1))
    deltas = []
    while engine.has_unfinished():
        deltas += engine.step()
    assert [len(d.prompt_logprobs) for d in deltas if d.prompt_logprobs] == [50]
    assert deltas[-1].metrics.num_cached_tokens == 0


def test_a_switch_is_a_boolean() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching must be true or false, got 'no'"):
        EngineConfig(enable_prefix_caching="no")  # type: ignore[arg-type]
