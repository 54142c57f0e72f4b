"""Policies under one workload: their configurations, objectives and, on the real engine, a decode step."""

from __future__ import annotations

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.evaluation.capacity import SearchConfig
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.serving import (
    ObjectiveConfig,
    compare_capacity,
    measure_decode_step,
    run_engine,
    search_engine,
)
from jaxserve.evaluation.workload import WorkloadConfig

TINY = WorkloadConfig(lengths="fixed", num_prompt_tokens=20, num_output_tokens=3, num_requests=4)


def test_objectives_in_seconds_and_in_decode_steps():
    assert ObjectiveConfig().objective(0.02) == Objective(5 * 0.02, 2.0)
    assert ObjectiveConfig(tbt_multiple=25.0, delay_seconds=1.0).objective(0.02) == Objective(25 * 0.02, 1.0)
    assert ObjectiveConfig(tbt_seconds=0.3, ttft_seconds=4.0).objective(0.02) == Objective(0.3, 2.0, 4.0)


@pytest.mark.parametrize("name", ["tbt_seconds", "tbt_multiple", "delay_seconds", "ttft_seconds"])
def test_wrong_objectives_are_named(name):
    with pytest.raises(ConfigError, match=f"{name} must be above 0, got -1"):
        ObjectiveConfig(**{name: -1.0})


def test_a_policy_of_whole_prompts_gets_the_budget_it_needs():
    config = EngineConfig(max_model_len=2048, token_budget=256)
    assert config.with_policy("sarathi") == config
    whole = config.with_policy("prefill_first")
    assert (whole.scheduler, whole.token_budget) == ("prefill_first", 2048)
    with pytest.raises(ConfigError, match=r"max_model_len must be given to compare with prefill_first.*, got none"):
        EngineConfig().with_policy("prefill_first")


def test_a_closed_loop_has_no_capacity():
    with pytest.raises(ConfigError, match="arrivals must have a rate for a search of capacity, got 'closed'"):
        compare_capacity(
            EngineConfig(), ["sarathi"], WorkloadConfig(arrivals="closed"), SearchConfig(), ObjectiveConfig(),
            on_trial=print, on_objective=print,
        )  # fmt: skip


def test_decode_step_and_search_on_the_real_engine(llm):
    seconds = measure_decode_step(llm.engine, context_tokens=40)
    assert seconds > 0
    assert llm.engine.blocks.num_used == 0
    assert len(run_engine(llm.engine, TINY).requests) == 4
    trials = []
    capacity, runs = search_engine(
        llm.engine, TINY, SearchConfig(low=50.0, high=100.0, repeats=1), Objective(60.0, 60.0),
        lambda policy, trial: trials.append((policy, trial.rate)),
    )  # fmt: skip
    assert (capacity.rate, capacity.reason) == (100.0, "the highest rate, 100/s, still passes")
    assert trials == [("sarathi", 50.0), ("sarathi", 100.0)]
    assert sorted(runs) == [50.0, 100.0]
