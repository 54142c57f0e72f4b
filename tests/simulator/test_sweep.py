from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.workload import WorkloadConfig
from jaxserve.scheduler import POLICIES
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.devices import A40_48G, A100_80G
from jaxserve.simulator.sweep import COLUMNS, Candidate, plot, rate_candidate, simulate, variants
from tests.simulator.models import LLAMA2_70B, MISTRAL_7B

WORKLOAD = WorkloadConfig(lengths="fixed", num_prompt_tokens=1000, num_output_tokens=50, num_requests=40)
ONE = Deployment(model=MISTRAL_7B, device=A100_80G)


def test_a_capacity_meets_the_objective_and_more_does_not() -> None:
    objective = Objective(p99_tbt_seconds=0.1, median_delay_seconds=0.2)
    candidate = rate_candidate("one", ONE, WORKLOAD, objective, low=0.5, high=100, tolerance=0.1)
    assert candidate.requests_per_second > 0.5
    assert candidate.run.meets(objective)
    assert not simulate(ONE, WORKLOAD, 1.25 * candidate.requests_per_second).meets(objective)
    assert candidate.replicas(10 * candidate.requests_per_second) == 10
    assert candidate.per_device == candidate.requests_per_second
    assert candidate.queue_could_grow(Objective(0.1, median_delay_seconds=0.1))
    assert not candidate.queue_could_grow(Objective(0.1))
    assert all(cell(candidate) for cell in COLUMNS.values())


def test_an_objective_out_of_reach() -> None:
    candidate = rate_candidate("one", ONE, WORKLOAD, Objective(p99_tbt_seconds=1e-3), low=0.5, high=10)
    assert candidate.requests_per_second == 0
    assert candidate.replicas(1.0) == math.inf


def test_what_requests_share_is_computed_once() -> None:
    """Half of each prompt; only the first request of a group has to compute it."""
    objective = Objective(p99_tbt_seconds=0.1, median_delay_seconds=0.2)
    shared = replace(WORKLOAD, shared_prefix_tokens=512, num_requests=80)
    apart = replace(shared, shared_prefix_tokens=0)
    found = [
        rate_candidate("one", ONE, config, objective, low=0.5, high=100, tolerance=0.1) for config in (shared, apart)
    ]
    assert found[0].requests_per_second > 1.3 * found[1].requests_per_second
    assert [candidate.run.cached_share for candidate in found] == [pytest.approx(0.512, abs=0.01), 0]
    groups = simulate(ONE, replace(shared, shared_prefix_groups=4), 1.0)
    assert groups.cached_share == pytest.approx(0.512 * 76 / 80, abs=0.001)


def test_variants() -> None:
    assert [d.token_budget for d in variants(ONE, "budgets", [256, 512]).values()] == [256, 512]
    policies = variants(ONE, "policies", [])
    assert list(policies) == [name for name, policy in POLICIES.items() if not policy.needs_step_times]
    assert policies["sarathi"].token_budget == 512
    assert policies["prefill_first"].token_budget == ONE.max_model_len
    eight = Deployment(model=LLAMA2_70B, device=A40_48G, tensor=4, pipeline=2)
    assert list(variants(eight, "shapes", [])) == ["TP1-PP8", "TP2-PP4", "TP4-PP2", "TP8-PP1"]
    with pytest.raises(ConfigError, match="max_num_seqs must not exceed token_budget, got 128 > 64"):
        variants(ONE, "budgets", [64])


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    candidate = Candidate("one", ONE, 1.0, simulate(ONE, WORKLOAD, 1.0))
    plot([candidate], Objective(0.1), str(tmp_path / "sweep.png"))
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
