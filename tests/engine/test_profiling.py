"""Budgets from step times, measured on a tiny model or read from a file. No test asserts on a time."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from jaxserve import ConfigError, EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.engine.profiling import largest_budget
from jaxserve.scheduler.step_time import BatchShape, Profile, StepTimeModel
from tests.models.golden import Golden

MODEL = StepTimeModel({16: 0.010, 32: 0.020, 64: 0.040}, seconds_per_kv_token=1e-5, seconds_per_pair=1e-6)
WORST = {rows: BatchShape(rows, 7, 1000, rows - 7, 1000 * rows) for rows in (16, 32, 64)}
"""They take 0.036, 0.062 and 0.114 s."""


@pytest.mark.parametrize(("slo_tbt_seconds", "budget"), [(0.0361, 16), (0.1, 32), (9.0, 64)])
def test_largest_budget(slo_tbt_seconds: float, budget: int) -> None:
    assert largest_budget(MODEL, WORST, slo_tbt_seconds) == budget


def test_no_budget_meets_the_objective() -> None:
    with pytest.raises(ConfigError, match=r"slo_tbt_seconds must be at least 0.036, .* 16 tokens .*, got 0.03"):
        largest_budget(MODEL, WORST, 0.03)


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Settings of a tiny model."""
    words = {f"<{i}>": i for i in range(96)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>")).save(str(tmp_path / "tokenizer.json"))
    golden = Golden("llama_gqa_tied")
    sizes = {"max_model_len": golden.length, "max_num_seqs": 4, "block_size": 8}
    return {"model": str(golden.checkpoint), "tokenizer": str(tmp_path), **sizes}


def make(tiny: dict[str, Any], **settings: Any) -> Engine:
    return Engine(EngineConfig(**tiny | settings), show_progress=False)


def test_automatic_budget(tiny: dict[str, Any]) -> None:
    engine = make(tiny, token_budget="auto", slo_tbt_seconds=1000.0)
    assert engine.config.token_budget == engine.scheduler.limits.token_budget == tiny["max_model_len"]
    engine.close()
    engine = make(tiny, token_budget="auto", warmup=False)
    assert engine.config.token_budget == tiny["max_model_len"], "the longest prompt, which fits the memory"
    engine.close()
    with pytest.raises(ConfigError, match=r"slo_tbt_seconds must be at least .*, got 1e-09"):
        make(tiny, token_budget="auto", slo_tbt_seconds=1e-9)


def test_budget_from_a_stored_profile(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The script writes it, the engine goes by what it says and checks what it is of."""
    path = tmp_path / "budget.json"
    flags = [word for name, value in tiny.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "profile_steps.py"))
    assert script["main"]([*flags, "--token-budget", "auto", "--slo-tbt", "1000", "--output", str(path)]) == 0
    written = Profile.from_json(path.read_text())
    assert list(written.step_time.base_seconds) == [16, 32, tiny["max_model_len"]]

    slow_above_32 = StepTimeModel({16: 0.01, 32: 0.02, 64: 9.0}, 0.0, 0.0)
    path.write_text(dataclasses.replace(written, step_time=slow_above_32).to_json())
    engine = make(tiny, token_budget="auto", slo_tbt_seconds=1.0, profile=str(path))
    assert engine.config.token_budget == engine.scheduler.limits.token_budget == 32
    engine.close()

    path.write_text(dataclasses.replace(written, dtype="bfloat16").to_json())
    with pytest.raises(ConfigError, match=r"profile: .* is of dtype 'bfloat16', the engine has 'float32'"):
        make(tiny, scheduler="adaptive", slo_tbt_seconds=1.0, profile=str(path))


def test_a_profile_that_cannot_be_read(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile: cannot read '.*none.json': .*No such file"):
        make(tiny, scheduler="adaptive", slo_tbt_seconds=1.0, profile=str(tmp_path / "none.json"))


def test_the_script_needs_an_objective(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "profile_steps.py"))
    with pytest.raises(SystemExit):
        script["main"]([])
    assert "--slo-tbt-seconds must be given" in capsys.readouterr().err
