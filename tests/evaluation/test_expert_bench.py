"""The benchmark of mixtures, on a tiny one; no test asserts on a time."""

from __future__ import annotations

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.evaluation.device_bench import Effort
from jaxserve.evaluation.expert_bench import ExpertRow, expert_cases
from tests.models.golden import Golden

SHORT = Effort(3, 0.0, 0.0)


def test_rows_and_the_experts_that_they_choose() -> None:
    cases = expert_cases(EngineConfig(model=str(Golden("qwen3_moe").checkpoint)), [1, 20])
    one, many = (case.measure(SHORT) for case in cases)
    assert (one.num_rows, one.num_active) == (1, 2)
    assert many.num_rows == 20
    assert 2 < many.num_active <= 8
    assert len(many.rounds) == 3


def test_a_table_is_of_medians() -> None:
    row = ExpertRow(16, 82, [(0.011, 0.010), (0.018, 0.010), (0.012, 0.008)]).describe()
    assert row["layer ms"] == "12.00"
    assert row["its experts' products ms"] == "10.00"
    assert (row["layer / products"], row["from - to"]) == ("1.50", "1.10 - 1.80")


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="model must have experts, got 'mistral-7b'"):
        expert_cases(EngineConfig(model="mistral-7b"), [1])
