"""Drafts of a run, counted by what a server shows to Prometheus or by the steps themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jaxserve.engine.metrics import DraftCounts, StepRecord
from jaxserve.errors import ConfigError
from jaxserve.evaluation.drafts import drafts_at, drafts_of
from jaxserve.evaluation.latency import RunResult
from jaxserve.evaluation.report import Series, draft_rows
from jaxserve.evaluation.serving import run_server
from jaxserve.evaluation.workload import WorkloadConfig
from jaxserve.request import RequestMetrics
from tests.server.conftest import FakeEngine, RunningServer

SIX_TOKENS = WorkloadConfig(lengths="fixed", num_prompt_tokens=4, num_output_tokens=6, num_requests=2, rate=1000.0)


def step_with(*sequences: tuple[int, int, int]) -> StepRecord:
    """Of each of its sequences, rows for drafts, drafts, and those that held."""
    record = StepRecord(num_rows=16)
    for sequence in sequences:
        record.drafts.add(*sequence)
    return record


FIRST, SECOND = step_with((3, 3, 2), (3, 2, 0)), step_with((1, 1, 1))
BOTH = DraftCounts(num_sequences=3, num_rows=7, num_verified=6, num_held=3, held=[2, 1])


def test_a_run_has_those_of_its_own_time(make_server: Callable[..., RunningServer]) -> None:
    server = make_server(http_port=0, num_engines=2)
    one, two = (engine.metrics for engine in server.engines)
    one.observe_step(FIRST, [])  # before it
    url = f"{server.url}/metrics"
    before = drafts_at(url)
    one.observe_step(FIRST, [])
    two.observe_step(SECOND, [])
    assert drafts_at(url).since(before) == BOTH == drafts_of([FIRST, SECOND])
    drafting: FakeEngine = server.engine
    drafting.on_step = [lambda *_: one.observe_step(SECOND, [])]
    result = run_server(server.target, SIX_TOKENS, metrics_url=url)
    assert result.drafts is not None
    assert result.drafts.num_held == result.drafts.num_rows > 0
    assert run_server(server.target, SIX_TOKENS).drafts is None


def test_the_table_has_only_runs_with_drafts() -> None:
    requests = [RequestMetrics(0.0, 0.0, [0.1])] * 2
    runs = [RunResult(requests, 1.0, 5, 11, drafts=drafts) for drafts in (BOTH, DraftCounts(), None)]
    assert draft_rows([Series(str(number), run, None) for number, run in enumerate(runs)]) == [{
        "policy": "0", "drafted": "6", "accepted": "3", "acceptance": "50%", "accepted by position": "67% 33%",
        "wasted rows": "4 (57%)", "tokens a decode": "1.50",
    }]  # fmt: skip


def test_an_address_without_metrics_is_told(make_server: Callable[..., RunningServer]) -> None:
    url = make_server(http_port=0).url
    for wrong in (f"{url}/nothing", "127.0.0.1:9/metrics"):
        with pytest.raises(ConfigError, match=r"metrics_url must be where a server shows its metrics, got '.*': "):
            drafts_at(wrong)
