"""Outputs with the prefix cache are those without: alone, in a pipeline, in windows and with a swap space, whatever is
preempted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.profiling import Profiler
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


SETTINGS: dict[str, tuple[str, dict[str, int]]] = {
    "alone": ("yi_gqa", {}),
    "pipeline": ("yi_gqa", {"pipeline_parallel": 2}),
    "window": ("mistral_window", {}),
    "swap": ("yi_gqa", {"swap_space_bytes": 2**20}),
    "swap-tensor": ("yi_gqa", {"swap_space_bytes": 2**20, "tensor_parallel": 2}),
}


def start(tiny_tokenizer: Path, name: str, **settings: int) -> Engine:
    """Its memory holds little more than two of the longest sequences."""
    config = EngineConfig(
        model=str(Golden(name).checkpoint), tokenizer=str(tiny_tokenizer), token_budget=16, max_num_seqs=4,
        max_model_len=MAX_LEN, block_size=BLOCK_SIZE, num_blocks=1 + 30, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    return Engine(config, show_progress=False)


@pytest.fixture(scope="module", params=SETTINGS)
def engine(request: pytest.FixtureRequest, tiny_tokenizer: Path) -> Iterator[Engine]:
    """Idle before and after every test."""
    name, settings = SETTINGS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Profiler, "seconds_per_swapped_block", lambda self: 1e-9)  # whatever this machine is busy with
        engine = start(tiny_tokenizer, name, **settings)
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


def test_what_has_left_the_cache(engine: Engine) -> None:
    """Where there is a swap space, it comes back from there instead of being computed again."""
    swaps = engine.scheduler.blocks.swap_space is not None
    prompts = [tokens(90) for _ in range(5)]
    want = [uncached(engine, prompt) for prompt in prompts]
    for prompt, output in zip(prompts, want, strict=True):
        ((again, _),) = serve(engine, [prompt], GREEDY)
        assert again == output
    if engine.scheduler.limits.window is None:
        hits = []
        for prompt, output in zip(prompts, want, strict=True):
            ((again, metrics),) = serve(engine, [prompt], GREEDY)
            assert again == output
            hits.append(metrics.num_cached_tokens)
        assert hits == [88 if swaps else 0] * 5
    names = "swapped_out_blocks", "swapped_in_blocks"
    copied = [engine.metrics.registry.get_sample_value(f"jaxserve_{name}_total") for name in names]
    assert all(copied) == any(copied) == swaps


def test_blocks_come_back_in_place(engine: Engine) -> None:
    """Not through a copy of the whole cache."""
    found = engine.runner._programs.lower_swap_in().compile().memory_analysis()
    assert (
        found.temp_size_in_bytes < 20 * engine.runner.block_bytes < engine.blocks.num_blocks * engine.runner.block_bytes
    )


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_space_bytes": -1}, "swap_space_bytes must be an integer of at least 0, got -1"),
        ({"swap_space_bytes": 0.5}, "swap_space_bytes must be an integer of at least 0, got 0.5"),
        (
            {"swap_space_bytes": 9, "enable_prefix_caching": False},
            "swap_space_bytes must be 0 without a prefix cache, got 9",
        ),
        (
            {"swap_space_bytes": 9, "pipeline_parallel": 2},
            "swap_space_bytes must be 0 with pipeline_parallel above 1, got 9",
        ),
    ],
)
def test_settings_of_the_swap_space(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_a_swap_space_is_of_use_or_refused(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"swap_space_bytes must hold a KV block of \d+ bytes at least, got 9"):
        start(tiny_tokenizer, "yi_gqa", swap_space_bytes=9)
    with pytest.raises(ConfigError, match=r"swap_space_bytes must be 0 for a model that looks back \d+ tokens at most"):
        start(tiny_tokenizer, "mistral_window", swap_space_bytes=2**20)
    monkeypatch.setattr(Profiler, "seconds_per_swapped_block", lambda self: 1e9)
    engine = start(tiny_tokenizer, "yi_gqa", swap_space_bytes=2**20)
    assert engine.scheduler.blocks.swap_space is None
    engine.close()


def test_logprobs_of_choices_are_those_of_whole_prompts(engine: Engine) -> None:
    """They share the context's blocks, and what is computed of each begins with the row before it."""
    context, choices = tokens(45), [tokens(n) for n in (1, 5, 9, 30)]

    def score(first: int) -> list[Any]:
        for choice in choices:
            params = SamplingParams(max_tokens=0, prompt_logprobs=2, logprob_start_len=first, cache_salt=str(first))
            engine.add_request(f"{first}-{len(choice)}", context + choice, params)
        deltas = []
        while engine.has_unfinished():
            deltas += engine.step()
        return sorted((delta for delta in deltas if delta.finish_reason), key=lambda delta: delta.num_prompt_tokens)

    for whole, part in zip(score(0), score(len(context)), strict=True):
        assert part.prompt_logprobs[: len(context)] == [None] * len(context)
        for entry, expected in zip(
            part.prompt_logprobs[len(context) :], whole.prompt_logprobs[len(context) :], strict=True
        ):
            # Rows of other buckets are rounded differently.
            assert next(iter(entry.items())) == (next(iter(expected)), pytest.approx(next(iter(expected.values()))))
        assert (whole.metrics.num_cached_tokens, part.metrics.num_cached_tokens) in [(0, 0), (0, 40)]
    assert part.metrics.num_cached_tokens == 40


def test_a_switch_is_a_boolean() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching must be true or false, got 'no'"):
        EngineConfig(enable_prefix_caching="no")  # type: ignore[arg-type]
