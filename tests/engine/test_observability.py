"""Metrics of a real run, and the trace file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.tracing import StepTracer, open_trace
from jaxserve.request import Request, RequestMetrics
from jaxserve.scheduler import Chunk


def test_recent_steps_are_those_that_ran(llm: LLM) -> None:
    recent = llm.engine.metrics.recent
    before = recent.num_steps
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, cache_salt="recent")
    llm.generate([[9] * 40, [8] * 300], params, use_tqdm=False)
    steps = recent.steps_after(before)
    bars = [(step.num_decode_tokens, step.num_prefill_tokens, step.num_padding_tokens) for step in steps]
    assert bars == [(0, 256, 0), (1, 84, 43), (2, 0, 14), (1, 0, 15)]
    assert [step.number for step in steps] == [*range(before + 1, before + 5)]
    assert all(step.seconds > 0 for step in steps)
    # As it was when each was launched: the first request ends while the last step is under way.
    assert [step.load.num_running for step in steps] == [2, 2, 2, 1]
    block_size = llm.engine.blocks.block_size
    assert steps[0].load.num_used_blocks == -(-40 // block_size) + -(-216 // block_size)
    assert recent.load == (0, 0, 0)
    assert recent.num_blocks == llm.engine.blocks.num_free
    assert recent.token_budget == 256
    assert recent.ttft().num_samples >= 2
    p50, p99, num_samples = recent.tbt()
    assert num_samples >= 4
    assert p50 is not None
    assert p99 is not None
    assert 0 < p50 <= p99


def test_metrics_count_what_ran(llm: LLM) -> None:
    registry = llm.engine.metrics.registry

    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"jaxserve_{name}", labels) or 0.0

    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count", "stalls_total",
             "inter_token_latency_seconds_count", "step_tokens_total", "request_queue_time_seconds_count",
             "iteration_tokens_total_count", "iteration_tokens_total_sum")  # fmt: skip
    before = {name: value(name) for name in names}
    ended = value("request_success_total", finished_reason="length")
    records: list[StepRecord] = []
    llm.engine.on_step.append(lambda record, chunks: records.append(record))
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, cache_salt="metrics")
    llm.generate([[9] * 40, [8] * 300], params, use_tqdm=False)
    llm.engine.on_step.pop()
    grown = {name: value(name) - before[name] for name in names}
    assert grown == {
        "prompt_tokens_total": 340, "generation_tokens_total": 10, "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 8, "step_tokens_total": 348, "request_queue_time_seconds_count": 2,
        "stalls_total": 0, "iteration_tokens_total_count": 6, "iteration_tokens_total_sum": 348,
    }  # fmt: skip
    assert value("request_success_total", finished_reason="length") == ended + 2
    assert value("compiles_after_warmup") == 0
    assert value("num_requests_running") == 0
    assert value("kv_cache_usage_perc") == 0
    # 256 tokens, then what is left of the long prompt beside the first decode, then decodes.
    assert [(r.num_tokens, r.num_decode_tokens) for r in records] == [(256, 0), (85, 1), (2, 2), (2, 2), (2, 2), (1, 1)]
    assert [r.num_rows for r in records] == [256, 128, 16, 16, 16, 16]
    for r in records:
        assert (
            r.start_seconds
            <= r.scheduled_seconds
            <= r.launched_seconds
            <= r.device_start_seconds
            <= r.ready_seconds
            <= r.processed_seconds
        )


@pytest.mark.parametrize("closed", [True, False])
def test_trace_is_readable_even_after_a_crash(tmp_path: Path, closed: bool) -> None:
    path = tmp_path / "trace.json"
    tracer = StepTracer(open_trace(str(path)))
    request = Request("r1", [1, 2, 3], SamplingParams(), 4, RequestMetrics(0.0))
    record = StepRecord(1.0, 1.001, 1.002, num_tokens=3, num_decode_tokens=0, num_rows=16,
                        device_start_seconds=1.002, waited_seconds=1.003, ready_seconds=1.05,
                        processed_seconds=1.06)  # fmt: skip
    tracer.add(record, [Chunk(request, 0, 3, slot=2, samples=True)])
    if closed:
        tracer.close()
    text = path.read_text()
    events = json.loads(text if closed else text.rstrip().rstrip(",") + "]")
    spans = {event["name"]: event for event in events if event.get("ph") == "X"}
    assert set(spans) == {"schedule", "launch", "wait", "process", "step 16", "prefill"}
    assert spans["step 16"]["ts"] == pytest.approx(1.002e6)
    assert spans["step 16"]["dur"] == pytest.approx(0.048e6)
    assert spans["prefill"]["args"] == {"request": "r1", "start": 0, "tokens": 3}
    names = {event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    assert names == {"host", "device", "sequence slot 2"}
