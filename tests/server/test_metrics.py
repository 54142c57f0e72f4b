"""What /metrics shows of the engines: under our names, told apart, and under vLLM's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.metrics import EngineMetrics, StepRecord
from jaxserve.request import FinishReason, Request, RequestMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.metrics import ServedMetrics
from tests.server.conftest import RunningServer
from tests.server.test_http import send

VLLM_SAMPLES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
    *(f"vllm:{name}_{part}" for part in ("bucket", "count", "sum") for name in (
        "iteration_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
        "request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens",
    )),
    "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens_per_pos_total",
}  # fmt: skip
"""As vLLM's documentation of its metrics has them."""


def finished_request() -> Request:
    """Scheduled after a second; tokens at 3, 3.5 and 5 s."""
    times = RequestMetrics(0.0, first_scheduled_seconds=1.0, token_seconds=[3.0, 3.5, 5.0])
    request = Request("r", (7,) * 30, SamplingParams(), 40, times, output_token_ids=[1, 2, 3])
    request.finish_reason = FinishReason.LENGTH
    return request


def test_vllms_names_have_what_ours_have() -> None:
    metrics = EngineMetrics(token_budget=64, num_blocks=100)
    metrics.observe_request(finished_request())
    step = StepRecord()
    step.drafts.add(num_rows=5, num_verified=3, num_held=2)
    metrics.observe_step(step, [])
    registry = CollectorRegistry()
    registry.register(ServedMetrics([metrics.registry], "tiny"))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("vllm:")]
    assert {sample.name for sample in samples if not sample.name.endswith("_created")} == VLLM_SAMPLES
    for sample in samples:
        assert (sample.labels["model_name"], sample.labels["engine"]) == ("tiny", "0")
    labels = {"model_name": "tiny", "engine": "0"}
    for name, value in {
        "request_queue_time_seconds_sum": 1, "request_prefill_time_seconds_sum": 2,
        "request_decode_time_seconds_sum": 2, "request_inference_time_seconds_sum": 4,
        "e2e_request_latency_seconds_sum": 5, "request_time_per_output_token_seconds_sum": 1,
        "inter_token_latency_seconds_count": 2, "request_params_max_tokens_sum": 40, "prompt_tokens_total": 30,
        "request_generation_tokens_sum": 3, "spec_decode_num_drafts_total": 1, "spec_decode_num_draft_tokens_total": 3,
        "spec_decode_num_accepted_tokens_total": 2,
    }.items():  # fmt: skip
        assert registry.get_sample_value(f"vllm:{name}", labels) == value, name
        assert registry.get_sample_value(f"jaxserve_{name}") == value, name
    places = [{**labels, "position": str(place)} for place in range(3)]
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [registry.get_sample_value(name, place) for place in places] == [1, 1, None]
    assert registry.get_sample_value("jaxserve_spec_decode_num_wasted_rows_total") == 3
    assert registry.get_sample_value("vllm:request_success_total", {**labels, "finished_reason": "length"}) == 1
    assert registry.get_sample_value("vllm:inter_token_latency_seconds_bucket", {**labels, "le": "0.5"}) == 1


def test_engines_are_told_apart() -> None:
    registries = [CollectorRegistry(), CollectorRegistry()]
    for number, registry in enumerate(registries):
        Counter("things", "Things", ["kind"], registry=registry).labels("a").inc(number + 1)
        Histogram("jaxserve_request_prompt_tokens", "Lengths", buckets=[1], registry=registry).observe(number)
    merged = CollectorRegistry()
    merged.register(ServedMetrics(registries, "tiny"))
    assert merged.get_sample_value("things_total", {"kind": "a", "engine": "1"}) == 2
    assert merged.get_sample_value("jaxserve_request_prompt_tokens_sum", {"engine": "0"}) == 0
    assert merged.get_sample_value("vllm:request_prompt_tokens_sum", {"engine": "1", "model_name": "tiny"}) == 1
    assert [family.name for family in merged.collect()] == [
        "things", "jaxserve_request_prompt_tokens", "vllm:request_prompt_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(("num_engines", "ours"), [(1, ""), (2, '{engine="1"}')])
def test_a_server_shows_both(make_server: Callable[..., RunningServer], num_engines: int, ours: str) -> None:
    server = make_server(http_port=0, num_engines=num_engines, served_model_name="first,second")
    text = send(server, "GET", "/metrics")[2].decode()
    assert f"\njaxserve_num_requests_running{ours} 0.0\n" in text
    label = f'engine="{num_engines - 1}",model_name="first"'
    assert f"\nvllm:num_requests_running{{{label}}} 0.0\n" in text
