"""The load generator against the fake engine's gRPC server, and the in-process one against engines."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from jaxserve.evaluation import load
from jaxserve.evaluation.latency import Objective
from jaxserve.evaluation.load import make_prompts, measure_engine, measure_server
from jaxserve.evaluation.workload import WorkloadConfig, WorkloadRequest, make_workload
from tests.server.conftest import MAX_MODEL_LEN, STEP_SECONDS, VOCAB_SIZE, FakeEngine


def small_workload(count: int = 12, **settings) -> list[WorkloadRequest]:
    return make_workload(
        WorkloadConfig(
            **{
                "lengths": "uniform",
                "min_total_tokens": 8,
                "max_total_tokens": 60,
                "num_requests": count,
                "rate": 40.0,
                **settings,
            }
        )
    )


class SteppedEngine(FakeEngine):
    """Notes when requests join, and refuses none."""

    def __init__(self) -> None:
        super().__init__()
        self.on_step: list = []
        self.most_in_flight = 0

    def step(self):
        self.most_in_flight = max(self.most_in_flight, len(self.running))
        return super().step()


def measure(server, workload, **settings):
    return measure_server(server.target, workload, vocab_size=VOCAB_SIZE, **settings)


def test_prompts_are_random_ids_of_the_asked_lengths():
    workload = small_workload()
    prompts = make_prompts(workload, 50_000, seed=3)
    assert [len(prompt) for prompt in prompts] == [request.num_prompt_tokens for request in workload]
    assert min(map(min, prompts)) >= 1000
    assert prompts == make_prompts(workload, 50_000, seed=3)
    assert prompts != make_prompts(workload, 50_000, seed=4)


def test_prompts_of_a_group_begin_alike():
    workload = small_workload(shared_prefix_tokens=10, shared_prefix_groups=2)
    beginnings = {0: set(), 1: set()}
    prompts = make_prompts(workload, 50_000, seed=3)
    for request, prompt in zip(workload, prompts, strict=True):
        assert len(prompt) == request.num_prompt_tokens
        assert request.num_shared_tokens == min(10, len(prompt))
        beginnings[request.group].add(tuple(prompt[: request.num_shared_tokens]))
    longest = {group: max(found, key=len) for group, found in beginnings.items()}
    assert all(one == longest[group][: len(one)] for group, found in beginnings.items() for one in found)
    assert longest[0] != longest[1]
    assert len({tuple(prompt) for prompt in prompts}) > 2


def test_open_loop_measures_every_request_of_the_workload(server):
    workload = small_workload()
    started = time.monotonic()
    result = measure(server, workload)
    elapsed = time.monotonic() - started
    assert (len(result.requests), result.num_failed, list(result.errors)) == (12, 0, [])
    assert result.num_prompt_tokens == sum(request.num_prompt_tokens for request in workload)
    assert result.num_output_tokens == sum(request.num_output_tokens for request in workload)
    by_arrival = sorted(result.requests, key=lambda request: request.arrival_seconds)
    assert [len(request.token_seconds) for request in by_arrival] == [r.num_output_tokens for r in workload]
    planned = np.array([request.arrival_seconds for request in workload])
    arrived = np.array([request.arrival_seconds for request in by_arrival])
    assert arrived - arrived[0] == pytest.approx(planned - planned[0])
    assert 0 < result.seconds <= elapsed
    # The fake engine's step is the least that a TBT can be on average; the delay is what the server reported.
    assert result.tbt_seconds.mean() >= 0.9 * STEP_SECONDS
    assert np.all(result.delay_seconds > 0)
    assert np.all(result.delay_seconds <= result.ttft_seconds)
    assert len(result.lag_seconds) == 12
    assert result.meets(Objective(p99_tbt_seconds=60, median_delay_seconds=60))


def test_closed_loop_keeps_that_many_in_flight(make_server):
    server = make_server(max_waiting=3)
    result = measure(server, small_workload(arrivals="closed", rate=None), concurrency=3)
    assert (len(result.requests), result.num_failed) == (12, 0)
    assert len({request.arrival_seconds for request in result.requests}) == 12


def test_a_request_that_fails_is_counted_and_told_and_the_others_go_on(server, caplog):
    workload = [*small_workload(4), WorkloadRequest(0.12, MAX_MODEL_LEN, 1)]
    with caplog.at_level(logging.WARNING):
        result = measure(server, workload)
    assert (len(result.requests), result.num_failed) == (4, 1)
    (error,) = result.errors
    assert error.startswith("INVALID_ARGUMENT: ")
    assert str(MAX_MODEL_LEN) in error
    assert f"1 requests failed; the first: {error}" in caplog.text
    assert not result.meets(Objective(p99_tbt_seconds=60, median_delay_seconds=60))


def test_refused_and_broken_off_requests_fail(make_server, eventually):
    crowded = measure(make_server(max_waiting=2), [WorkloadRequest(0.0, 4, 20)] * 5)
    assert crowded.num_failed == 3
    assert "RESOURCE_EXHAUSTED: max_waiting requests are in flight, the limit is 2" in crowded.errors[0]

    server = make_server()
    server.engine.step_error = RuntimeError("secret")
    broken = measure(server, [WorkloadRequest(0.0, 4, 20)] * 2)
    assert (len(broken.requests), broken.num_failed, broken.num_output_tokens) == (0, 2, 0)
    assert "UNAVAILABLE" in broken.errors[0]
    assert broken.seconds > 0
    assert broken.summary().num_failed == 2


def test_no_server_is_a_failure_of_every_request():
    result = measure_server("127.0.0.1:1", [WorkloadRequest(0.0, 4, 2)] * 3, vocab_size=VOCAB_SIZE)
    assert result.num_failed == 3
    assert result.errors[0].startswith("UNAVAILABLE: ")


def test_a_late_generator_is_told(server, monkeypatch, caplog):
    real = load.AsyncClient.generate

    def slow(self, *args, **kwargs):
        time.sleep(0.06)  # holds up the event loop, and with it every request that follows
        return real(self, *args, **kwargs)

    monkeypatch.setattr(load.AsyncClient, "generate", slow)
    with caplog.at_level(logging.WARNING):
        result = measure(server, [WorkloadRequest(0.0, 4, 2)] * 4)
    assert max(result.lag_seconds) > 0.05
    assert "the load generator was late: P99" in caplog.text
    # What the users waited for the generator is part of their delay.
    assert result.delay_seconds.max() > 0.1


def test_engine_in_process_open_loop():
    engine = SteppedEngine()
    workload = small_workload()
    result = measure_engine(engine, workload)
    assert (len(result.requests), result.num_failed) == (12, 0)
    assert result.num_output_tokens == sum(request.num_output_tokens for request in workload)
    arrived = np.sort([request.arrival_seconds for request in result.requests])
    planned = np.array([request.arrival_seconds for request in workload])
    assert arrived - arrived[0] == pytest.approx(planned - planned[0])
    assert np.all(result.delay_seconds > 0)
    assert engine.on_step == []


def test_engine_in_process_closed_loop():
    engine = SteppedEngine()
    result = measure_engine(engine, small_workload(arrivals="closed", rate=None), concurrency=3)
    assert len(result.requests) == 12
    assert engine.most_in_flight == 3


def test_engine_in_process_counts_what_the_engine_refuses():
    result = measure_engine(SteppedEngine(), [*small_workload(2), WorkloadRequest(0.01, MAX_MODEL_LEN, 1)])
    assert (len(result.requests), result.num_failed) == (2, 1)
    assert "exceeds max_model_len 1000" in result.errors[0]


def test_real_engine_gives_the_steps_of_the_run(llm):
    workload = small_workload(4)
    result = measure_engine(llm.engine, workload)
    assert (len(result.requests), result.num_failed, result.num_stalls) == (4, 0, 0)
    assert result.num_output_tokens == sum(request.num_output_tokens for request in workload)
    # A request's last token is computed by no step.
    computed = sum(r.num_prompt_tokens + r.num_output_tokens - 1 for r in workload)
    assert sum(step.num_tokens for step in result.steps) >= computed
    assert all(step.num_decode_tokens <= step.num_tokens <= step.num_rows for step in result.steps)
    assert result.num_preemptions == 0
