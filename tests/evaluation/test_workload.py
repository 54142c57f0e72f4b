"""Lengths hit the paper's numbers, arrivals have their statistics, and a seed is a workload."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import pytest

from jaxserve.cli import parse_config
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.evaluation.workload import WorkloadConfig, WorkloadRequest, make_workload

TABLE_2 = {
    "openchat_sharegpt4": {"num_prompt_tokens": (1730, 5696), "num_output_tokens": (415, 834)},
    "arxiv_summarization": {"num_prompt_tokens": (7059, 12985), "num_output_tokens": (208, 371)},
}
"""Median and P90, arXiv 2403.02310."""
STD = {
    "openchat_sharegpt4": {"num_prompt_tokens": 2088},
    "arxiv_summarization": {"num_prompt_tokens": 3638},
}
"""Those of the outputs: 101 contradicts its median and P90, 265 comes from a few very long ones."""


def column(workload: list[WorkloadRequest], name: str) -> np.ndarray:
    return np.array([getattr(request, name) for request in workload])


def lengths(workload: list[WorkloadRequest]) -> list[tuple[int, int]]:
    return [(request.num_prompt_tokens, request.num_output_tokens) for request in workload]


def totals(workload: list[WorkloadRequest]) -> np.ndarray:
    return column(workload, "num_prompt_tokens") + column(workload, "num_output_tokens")


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"{index * 0.5},{100 + index},{10 + index}\n" for index in range(20))
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    return str(path)


@pytest.mark.parametrize("name", TABLE_2)
def test_fitted_lengths_hit_the_papers_median_and_p90(name):
    workload = make_workload(WorkloadConfig(lengths=name, num_requests=100_000))
    for quantity, (median, p90) in TABLE_2[name].items():
        tokens = column(workload, quantity)
        assert np.median(tokens) == pytest.approx(median, rel=0.03)
        assert np.percentile(tokens, 90) == pytest.approx(p90, rel=0.03)
        if quantity in STD[name]:
            assert tokens.std() == pytest.approx(STD[name][quantity], rel=0.2)
    assert totals(workload).max() <= 16384


@pytest.mark.parametrize("name", ["openchat_sharegpt4", "uniform", "zipf", "fixed"])
def test_a_seed_gives_the_same_lengths_at_every_rate_and_count(name):
    config = WorkloadConfig(lengths=name, num_requests=50, rate=1.0, workload_seed=7)
    slow, fast = make_workload(config), make_workload(dataclasses.replace(config, rate=4.0))
    assert lengths(slow) == lengths(fast)
    assert column(slow, "arrival_seconds") == pytest.approx(4 * column(fast, "arrival_seconds"))
    assert make_workload(dataclasses.replace(config, num_requests=30)) == slow[:30]
    assert make_workload(config) == slow
    if name != "fixed":
        assert lengths(make_workload(dataclasses.replace(config, workload_seed=8))) != lengths(slow)


def test_uniform_and_zipf_lengths():
    config = WorkloadConfig(
        lengths="uniform", num_requests=20_000, min_total_tokens=100, max_total_tokens=499, prompt_output_ratio=3.0
    )
    uniform = make_workload(config)
    assert totals(uniform).min() >= 100
    assert totals(uniform).max() <= 499
    assert totals(uniform).mean() == pytest.approx(299.5, rel=0.01)
    assert (column(uniform, "num_prompt_tokens") / column(uniform, "num_output_tokens")).mean() == pytest.approx(
        3, 0.02
    )
    zipf = totals(make_workload(dataclasses.replace(config, lengths="zipf", zipf_exponent=1.0)))
    ranks = np.arange(1, 401)
    weights = 1 / ranks
    assert zipf.mean() == pytest.approx(float((weights * (99 + ranks)).sum() / weights.sum()), rel=0.02)
    assert (zipf == 100).mean() == pytest.approx(1 / weights.sum(), rel=0.05)


def test_scaling_then_clipping_takes_from_the_prompt_first():
    config = WorkloadConfig(lengths="fixed", num_prompt_tokens=800, num_output_tokens=200, num_requests=1)
    assert lengths(make_workload(config)) == [(800, 200)]
    assert lengths(make_workload(config, max_model_len=500)) == [(300, 200)]
    assert lengths(make_workload(config, max_model_len=100)) == [(1, 99)]
    assert lengths(make_workload(dataclasses.replace(config, max_total_tokens=600))) == [(400, 200)]
    scaled = dataclasses.replace(config, length_scale=0.125, max_total_tokens=600)
    assert lengths(make_workload(scaled, max_model_len=60)) == [(35, 25)]
    assert lengths(make_workload(dataclasses.replace(config, length_scale=1e-6))) == [(1, 1)]


def test_poisson_arrivals():
    """Gaps have mean 1/rate and as large a deviation; counts in a window have mean and variance rate x window."""
    times = column(make_workload(WorkloadConfig(lengths="fixed", rate=5.0, num_requests=50_000)), "arrival_seconds")
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    assert gaps.std() == pytest.approx(0.2, rel=0.03)
    counts = np.histogram(times, bins=np.arange(0, times[-1] // 2 * 2, 2.0))[0]
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.06)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_arrivals_have_the_coefficient_of_variation(cv):
    config = WorkloadConfig(lengths="fixed", arrivals="gamma", cv=cv, rate=2.0, num_requests=100_000)
    gaps = np.diff(column(make_workload(config), "arrival_seconds"))
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_trace_arrivals_keep_their_rows_and_can_be_stretched_to_a_rate(trace):
    config = WorkloadConfig(lengths="trace", arrivals="trace", trace_file=trace, num_requests=20)
    workload = make_workload(config)
    assert lengths(workload) == [(100 + i, 10 + i) for i in range(20)]
    assert column(workload, "arrival_seconds") == pytest.approx(np.arange(20) * 0.5)
    stretched = make_workload(dataclasses.replace(config, rate=10.0))
    assert column(stretched, "arrival_seconds") == pytest.approx(np.arange(20) * 0.1)
    assert lengths(stretched) == lengths(workload)
    part = make_workload(dataclasses.replace(config, num_requests=5))
    assert part[0].arrival_seconds == 0
    assert lengths(part) == [(part[0].num_prompt_tokens + i, part[0].num_output_tokens + i) for i in range(5)]


def test_trace_lengths_are_drawn_for_other_arrivals(trace):
    workload = make_workload(WorkloadConfig(lengths="trace", trace_file=trace, num_requests=2000))
    assert {p - o for p, o in lengths(workload)} == {90}
    assert {p for p, _ in lengths(workload)} == set(range(100, 120))


def test_closed_arrivals_and_duration(trace):
    closed = make_workload(WorkloadConfig(arrivals="closed", num_requests=9))
    assert [request.arrival_seconds for request in closed] == [0] * 9
    assert len(make_workload(WorkloadConfig(rate=3.0, duration_seconds=40))) == 120
    # The trace's own rate is 20 requests in 9.5 s.
    config = WorkloadConfig(lengths="trace", arrivals="trace", trace_file=trace, duration_seconds=4.75)
    assert len(make_workload(config)) == 10


def test_the_mean_rate_is_known_unless_answers_or_a_trace_pace_the_requests():
    assert WorkloadConfig().mean_rate == 1.0
    assert WorkloadConfig(rate=3.0, arrivals="gamma").mean_rate == 3.0
    assert WorkloadConfig(arrivals="trace", trace_file="x").mean_rate is None
    assert WorkloadConfig(arrivals="closed").mean_rate is None


def test_flags():
    parser = argparse.ArgumentParser()
    argv = ["--rate", "2.5", "--lengths", "zipf", "--token-budget", "512"]
    engine, workload, _ = parse_config(parser, argv, EngineConfig, WorkloadConfig)
    assert (engine.token_budget, workload.rate, workload.lengths) == (512, 2.5, "zipf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": "short"}, "lengths must be one of openchat_sharegpt4, .*, got 'short'"),
        ({"arrivals": "late"}, "arrivals must be one of poisson, gamma, trace, closed, got 'late'"),
        ({"num_requests": 0}, "num_requests must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"num_output_tokens": 0}, "num_output_tokens must be at least 1, got 0"),
        ({"min_total_tokens": 1}, r"min_total_tokens must be in \[2, max_total_tokens 16384\], got 1"),
        ({"max_total_tokens": 32}, r"min_total_tokens must be in \[2, max_total_tokens 32\], got 64"),
        ({"rate": 0.0}, "rate must be above 0, got 0"),
        ({"cv": -1.0}, "cv must be above 0, got -1"),
        ({"length_scale": float("nan")}, "length_scale must be above 0, got nan"),
        ({"duration_seconds": 0.0}, "duration_seconds must be above 0, got 0"),
        ({"prompt_output_ratio": 0.0}, "prompt_output_ratio must be above 0, got 0"),
        ({"zipf_exponent": -0.5}, "zipf_exponent must be at least 0, got -0.5"),
        ({"workload_seed": -1}, "workload_seed must be at least 0, got -1"),
        ({"shared_prefix_tokens": -1}, "shared_prefix_tokens must be at least 0, got -1"),
        ({"shared_prefix_groups": 0}, "shared_prefix_groups must be at least 1, got 0"),
        ({"arrivals": "trace"}, "trace_file must name a file where lengths or arrivals are 'trace', got none"),
        ({"arrivals": "closed", "duration_seconds": 5.0}, "duration_seconds must be left out for closed .*, got 5"),
        ({"arrivals": "closed", "rate": 2.0}, "rate must be left out for closed .*, got 2"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        WorkloadConfig(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "trace_file: cannot read"),
        ("", "trace_file must have a column num_prefill_tokens, '.*' has none"),
        (
            "num_prefill_tokens,x\n1,2\n",
            "must have a column num_decode_tokens, '.*' has num_prefill_tokens, x",
        ),
        ("num_prefill_tokens,num_decode_tokens\n", "trace_file must hold at least one request, '.*' has none"),
        (
            "num_prefill_tokens,num_decode_tokens\n5,7\n5,many\n",
            "numbers, '.*' has in column num_decode_tokens: .*'many'",
        ),
        (
            "num_prefill_tokens,num_decode_tokens\n5,7\n",
            "must have a column arrived_at for arrivals of a trace",
        ),
        (
            "num_prefill_tokens,num_decode_tokens,arrived_at\n5,7,0\n",
            "num_requests must not exceed the 1 of trace_file '.*', got 128",
        ),
    ],
)
def test_wrong_traces_are_named(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_workload(WorkloadConfig(lengths="trace", arrivals="trace", trace_file=str(path)))


def test_a_model_too_short_for_any_request_is_named():
    with pytest.raises(ConfigError, match="max_model_len must be at least 2 for a prompt and an output, got 1"):
        make_workload(WorkloadConfig(), max_model_len=1)
