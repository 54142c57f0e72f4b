"""Predictions of measured comparisons, where the truth is known: the measured engine was itself simulated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jaxserve.evaluation.capacity import find_capacity
from jaxserve.evaluation.latency import Objective, RunResult
from jaxserve.evaluation.workload import WorkloadConfig, make_workload
from jaxserve.scheduler import POLICIES, Limits
from jaxserve.scheduler.step_time import Profile, RelativeError, StepTimeModel
from jaxserve.simulator.cost import FittedCost
from jaxserve.simulator.simulator import Simulator
from jaxserve.simulator.validate import predict
from scripts import simulate

MODEL = StepTimeModel({16: 0.02, 32: 0.025, 64: 0.04, 128: 0.07, 256: 0.13}, 1e-6, 1e-7)
PROFILE = Profile("tiny", "float32", "cpu", "2026-11-25", RelativeError(0.01, 0.02), MODEL)
ENGINE = {
    "max_model_len": 256, "max_num_seqs": 8, "token_budget": 64, "block_size": None, "num_blocks": None,
    "slo_tbt_seconds": None,
}  # fmt: skip
WORKLOAD = {"lengths": "fixed", "num_prompt_tokens": 180, "num_output_tokens": 30, "num_requests": 100}
SEARCH = {"low": 0.5, "high": 64.0, "repeats": 1, "tolerance": 0.1}


def report(step_time: StepTimeModel) -> dict:
    """Of an engine whose steps take what ``step_time`` says, in the form of bench.py's."""

    def measure(policy: str, budget: int, rate: float, seed: int) -> RunResult:
        limits = Limits(token_budget=budget, max_num_seqs=8, max_model_len=256, num_blocks=200, block_size=16)
        workload = WorkloadConfig(**WORKLOAD, rate=rate, workload_seed=seed)
        simulator = Simulator(POLICIES[policy], limits, FittedCost(step_time))
        return simulator.run(make_workload(workload, max_model_len=256))

    series = []
    for policy, budget in (("sarathi", 64), ("prefill_first", 256)):
        found = find_capacity(
            lambda rate, seed, p=policy, b=budget: measure(p, b, rate, seed), Objective(0.2), **SEARCH
        )
        series.append({"name": policy, "capacity": found.to_json()})
    return {
        "settings": {"engine": ENGINE, "workload": WORKLOAD, "search": SEARCH},
        "objective": {"p99_tbt_seconds": 0.2, "median_delay_seconds": 2.0},
        "series": series,
    }


def test_the_same_step_times_give_the_same_capacities() -> None:
    for found in predict(report(MODEL), PROFILE):
        assert found.measured > 0
        assert found.error == 0
        for trial in found.trials:
            assert trial.simulated_p99_tbt_seconds == pytest.approx(trial.measured_p99_tbt_seconds)
            assert trial.simulated_delay_seconds == pytest.approx(trial.measured_delay_seconds)


def test_an_engine_slower_than_its_profile_has_less_capacity_than_predicted() -> None:
    slower = StepTimeModel({rows: 1.5 * seconds for rows, seconds in MODEL.base_seconds.items()}, 1e-6, 1e-7)
    sarathi, _ = predict(report(slower), PROFILE)
    assert sarathi.error > 0.2


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    measured, profile = tmp_path / "capacity.json", tmp_path / "profile.json"
    measured.write_text(json.dumps(report(MODEL)))
    profile.write_text(PROFILE.to_json())
    monkeypatch.setattr(sys, "argv", ["simulate.py", "--against", str(measured), "--profile", str(profile)])
    simulate.main()
    assert "+0.0%" in capsys.readouterr().out
    measured.write_text("{}")
    with pytest.raises(SystemExit):
        simulate.main()
    assert f"against: {str(measured)!r} is no report of bench.py capacity" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["simulate.py", "--against", str(measured)])
    with pytest.raises(SystemExit):
        simulate.main()
    assert "against needs the step times of the measured engine: give --profile" in capsys.readouterr().err
