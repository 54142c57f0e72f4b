"""The simulator runs the real scheduler: what holds for the engine must hold here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, RequestError
from jaxserve.evaluation.workload import WorkloadRequest
from jaxserve.scheduler import POLICIES, Batch, Pace, Scheduler
from jaxserve.scheduler.step_time import StepTimeModel
from jaxserve.simulator.cost import FittedCost
from jaxserve.simulator.deployment import Deployment
from jaxserve.simulator.devices import A40_48G, A100_80G, Link, find_device
from jaxserve.simulator.simulator import SimulatedRun
from tests.simulator.models import LLAMA2_70B, MISTRAL_7B
from tests.simulator.token_cost import TokenCost, poisson, simulator_for


def watch(scheduler: Scheduler) -> list[Batch]:
    """Every batch that the scheduler makes."""
    batches: list[Batch] = []
    schedule = scheduler.schedule

    def noting() -> Batch:
        batches.append(schedule())
        return batches[-1]

    scheduler.schedule = noting  # type: ignore[method-assign]
    return batches


def test_drafts_that_hold_spare_steps() -> None:
    """One request: of seven drafts all hold, or seven in ten of those whose predecessor does, or none."""
    workload = [WorkloadRequest(arrival_seconds=0.0, num_prompt_tokens=100, num_output_tokens=801)]
    deployment = Deployment(model=MISTRAL_7B, device=A100_80G)
    runs = [
        dataclasses.replace(deployment, speculative_acceptance=acceptance).simulate(workload)
        for acceptance in (None, 0.0, 0.7, 1.0)
    ]
    batches = [run.num_batches for run in runs]
    assert batches[:2] == [801, 801]
    assert 801 / batches[2] == pytest.approx((1 - 0.7**8) / (1 - 0.7), rel=0.1)
    assert batches[3] < 110
    plain, none, most, _ = (run.tpot_seconds[0] for run in runs)
    assert none < 1.05 * plain
    assert most < 0.5 * plain
    assert all(len(run.requests[0].token_seconds) == 801 for run in runs)


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(sorted(name for name, policy in POLICIES.items() if not policy.needs_step_times)),
    num_stages=st.integers(1, 4),
    lock_step=st.booleans(),
    num_blocks=st.integers(89, 120),
    rate=st.floats(0.1, 20),
)
def test_every_token_is_made_and_every_block_returned(
    policy: str, num_stages: int, lock_step: bool, num_blocks: int, rate: float
) -> None:
    """Also with so few blocks that requests are preempted; one of full length alone fits into 88."""
    workload = poisson(30, rate)
    budget = 700 if POLICIES[policy].runs_whole_prompts else 64
    simulator = simulator_for(policy, TokenCost(num_stages), budget=budget, num_blocks=num_blocks, lock_step=lock_step)
    scheduler = simulator.scheduler
    batches = watch(scheduler)
    run = simulator.run(workload)
    for asked, metrics in zip(workload, run.requests, strict=True):
        assert len(metrics.token_seconds) == asked.num_output_tokens
        assert metrics.first_scheduled_seconds >= asked.arrival_seconds
        assert metrics.token_seconds == sorted(metrics.token_seconds)
        assert metrics.finished_seconds == metrics.token_seconds[-1]
    assert run.num_output_tokens == sum(asked.num_output_tokens for asked in workload)
    assert run.num_prompt_tokens == sum(asked.num_prompt_tokens for asked in workload)
    assert max(batch.num_tokens for batch in batches) <= budget
    scheduler.blocks.check()
    assert scheduler.blocks.num_used == 0


def test_the_same_run_twice_is_the_same() -> None:
    def run() -> SimulatedRun:
        return simulator_for("sarathi", TokenCost(2), budget=64).run(poisson(40, 2.0))

    assert run() == run()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_sarathi_stalls_no_decode(num_stages: int) -> None:
    run = simulator_for("sarathi", TokenCost(num_stages), budget=64).run(poisson(60, 3.0))
    assert run.num_stalls == 0
    assert run.tbt_seconds.max() <= 64e-3 * (2 * num_stages - 1) + 1e-9
    baseline = simulator_for("prefill_first", TokenCost(num_stages), budget=256).run(poisson(60, 3.0))
    assert baseline.num_stalls > 0
    assert baseline.tbt_seconds.max() > run.tbt_seconds.max()


def test_one_request_by_hand() -> None:
    """100 prompt tokens in chunks of 64 and 36, then two decodes; arrival at 5 s; two stages."""
    run = simulator_for("sarathi", TokenCost(2), budget=64).run([WorkloadRequest(5.0, 100, 3)])
    (metrics,) = run.requests
    assert metrics.first_scheduled_seconds == 5.0
    assert metrics.token_seconds == pytest.approx([5.164, 5.166, 5.168])  # 64 + 64 + 36, the second chunk behind
    assert run.seconds == pytest.approx(0.168)
    assert run.num_batches == 4
    assert run.busy_seconds == pytest.approx((0.102, 0.102))


def test_micro_batches_share_no_decode() -> None:
    """A request's token must have left the last stage before its next one enters the first."""
    simulator = simulator_for("sarathi", TokenCost(3), budget=64)
    batches = watch(simulator.scheduler)
    simulator.run([WorkloadRequest(0.0, 8, 40)] * 12)
    sizes = [len(batch.chunks) for batch in batches if batch.chunks]
    for one, two, three in zip(batches, batches[1:], batches[2:], strict=False):
        assert not one.chunks.keys() & two.chunks.keys()
        assert not one.chunks.keys() & three.chunks.keys() or not two.chunks
    assert np.median(sizes) == 4


def test_a_deployment_holds_the_cache_that_memory_leaves() -> None:
    deployment = Deployment(model=MISTRAL_7B, device=A100_80G)
    gib = 2**30
    assert deployment.num_blocks == int((0.9 * 80 * gib - 14.48e9) // (131072 * 64))
    assert deployment.cost.num_stages == 1
    run = deployment.simulate(poisson(20, 2.0, prompt=1000, output=50))
    assert run.num_stalls == 0
    assert 0 < run.utilisation <= 1


def test_adaptive_budgets_meet_the_objective_with_measured_steps() -> None:
    """A fixed budget of 2048 breaks it; where the model is right, the adaptive one keeps to it."""
    step_time = StepTimeModel({n: 1e-4 * n for n in range(128, 2049, 128)}, 1e-8, 1e-10)
    workload = poisson(40, 1.0, prompt=2000, output=100)
    longest = {}
    for policy in ("sarathi", "adaptive"):
        deployment = Deployment(
            model=MISTRAL_7B,
            device=A100_80G,
            scheduler=policy,
            token_budget=2048,
            measured=FittedCost(step_time),
            pace=Pace(0.05, step_time),
        )
        longest[policy] = deployment.simulate(workload).tbt_seconds.max()
    assert longest["adaptive"] <= 0.05 < longest["sarathi"]


def test_a_swap_space_spares_what_the_cache_has_no_room_for() -> None:
    """Of 30 groups, whose beginnings are three times what the memory holds."""
    workload = [replace(asked, num_shared_tokens=4000, group=i % 30) for i, asked in enumerate(
        poisson(90, 1.0, prompt=4200, output=20)
    )]  # fmt: skip
    small = Deployment(model=MISTRAL_7B, device=A100_80G, memory_share=0.24)
    without, with_it = small.simulate(workload), replace(small, swap_space_bytes=2**36).simulate(workload)
    assert without.cached_share < 0.2 < 0.5 < with_it.cached_share
    assert np.median(with_it.ttft_seconds) < 0.6 * np.median(without.ttft_seconds)
    slow = replace(small, device=replace(A100_80G, pcie=Link(1e9, 1e-5)), swap_space_bytes=2**36)
    assert slow.simulate(workload).cached_share == without.cached_share, "it would take longer than to compute"


def test_a_flood_of_long_prompts_at_most_doubles_another_clients_ttft() -> None:
    """With the default budget; behind the same flood under no names the others would wait for all of it."""
    after = np.random.default_rng(0).exponential(0.25, 60).cumsum()
    short = [WorkloadRequest(float(seconds), 100, 16, client="short") for seconds in after]
    flood = [WorkloadRequest(0.001 * index, 4096, 1, client="long") for index in range(150)]
    deployment = Deployment(model=MISTRAL_7B, device=find_device("h100"), token_budget=256)

    def p99_ttft_seconds(*workload: WorkloadRequest) -> float:
        asked = sorted(workload, key=lambda request: request.arrival_seconds)
        served = zip(asked, deployment.simulate(asked).requests, strict=True)
        return float(
            np.percentile([metrics.ttft_seconds for one, metrics in served if one.num_prompt_tokens == 100], 99)
        )

    alone, beside = p99_ttft_seconds(*short), p99_ttft_seconds(*short, *flood)
    assert beside <= 2 * alone
    assert p99_ttft_seconds(*(replace(one, client="") for one in (*short, *flood))) > 100 * alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_space_bytes": -1}, "swap_space_bytes must be at least 0, .* got -1 with pipeline 1"),
        (
            {"swap_space_bytes": 1, "pipeline": 2},
            "swap_space_bytes must be .* 0 with a pipeline, got 1 with pipeline 2",
        ),
        ({"tensor": 0}, "tensor must be at least 1, got 0"),
        ({"tensor": 3}, "tensor must divide the model's 32 heads, got 3"),
        ({"pipeline": 33}, "pipeline must not exceed the model's 32 layers, got 33"),
        ({"scheduler": "lifo"}, "scheduler must be one of .*sarathi.*, got 'lifo'"),
        ({"token_budget": 64}, "max_num_seqs must not exceed token_budget, got 128 > 64"),
        ({"memory_share": 0.0}, r"memory_share must be in \(0, 1\], got 0"),
        ({"scheduler": "adaptive"}, "scheduler adaptive needs a pace"),
        ({"measured": TokenCost(2)}, "pipeline must be the measured 2, got 1"),
        ({"model": LLAMA2_70B, "device": A40_48G, "tensor": 2}, r"weights of 64.2 GiB a device leave no room .* 2 x 1"),
    ],
)
def test_deployments_that_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Deployment(**{"model": MISTRAL_7B, "device": A100_80G} | settings)


def test_unknown_device() -> None:
    with pytest.raises(ConfigError, match=r"device must be one of a100-80g, .*, got 'tpu'"):
        find_device("tpu")


def test_a_request_that_is_too_long() -> None:
    with pytest.raises(RequestError, match="request 0 has 701 tokens, max_model_len is 700"):
        simulator_for("sarathi", TokenCost(1), budget=64).run([WorkloadRequest(0.0, 600, 101)])


def test_a_request_that_never_fits() -> None:
    with pytest.raises(RequestError, match="request 1 needs 90 KV tokens, the device's memory holds 72"):
        simulator_for("sarathi", TokenCost(1), budget=64, num_blocks=10).run(
            [WorkloadRequest(0.0, 8, 8), WorkloadRequest(0.0, 80, 10)]
        )


def test_no_jax_is_imported() -> None:
    code = "import sys, jaxserve.simulator.deployment; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
