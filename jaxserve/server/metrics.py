"""What a server shows to Prometheus: its own state, and what its engines count, under our names and under vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.registry import Collector

from jaxserve.server.admission import Admission

OURS, VLLMS = "jaxserve_", "vllm:"
SHARED_NAMES = frozenset({
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions", "prompt_tokens",
    "generation_tokens", "request_success", "iteration_tokens_total", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens",
    "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
})  # fmt: skip
"""Families, behind either prefix, that vLLM has as well, with the same meaning."""


class ServedMetrics(Collector):
    """The metrics of engines that serve one model. Several are told apart by the label ``engine``, as in vLLM.

    What vLLM has too comes a second time under its name and labels, ``model_name`` among them.
    """

    def __init__(self, registries: Sequence[CollectorRegistry], model_name: str) -> None:
        self._registries, self._model_name = registries, model_name

    def collect(self) -> Iterator[Metric]:
        for families in zip(*(registry.collect() for registry in self._registries), strict=True):
            numbered = _merged(families)
            yield families[0] if len(families) == 1 else numbered
            if numbered.name.removeprefix(OURS) in SHARED_NAMES:
                yield self._as_vllms(numbered)

    def _as_vllms(self, family: Metric) -> Metric:
        renamed = Metric(family.name.replace(OURS, VLLMS), family.documentation, family.type)
        for sample in family.samples:
            labels = {**sample.labels, "model_name": self._model_name}
            renamed.samples.append(sample._replace(name=sample.name.replace(OURS, VLLMS), labels=labels))
        return renamed


def watch_admission(admission: Admission, max_waiting: int, registry: CollectorRegistry) -> None:
    """Show what a server's probes say, and how near to refusing requests it is."""

    def gauge(name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"{OURS}{name}", text, registry=registry).set_function(value)

    gauge("ready", "1 while requests are admitted, as /ready says", lambda: admission.is_ready)
    gauge("requests_in_flight", "Requests under way, those that still tokenize included", lambda: admission.num_active)
    gauge("max_waiting", "Requests in flight from which on new ones are refused", lambda: max_waiting)


def _merged(families: Sequence[Metric]) -> Metric:
    """One family of several engines, numbered in order."""
    merged = Metric(families[0].name, families[0].documentation, families[0].type)
    for number, family in enumerate(families):
        for sample in family.samples:
            merged.samples.append(sample._replace(labels={**sample.labels, "engine": str(number)}))
    return merged
