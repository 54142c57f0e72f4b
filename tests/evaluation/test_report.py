"""The page is whole, loads nothing, and shows the numbers; the JSON beside it is strict."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxserve.engine.metrics import StepRecord
from jaxserve.errors import ConfigError
from jaxserve.evaluation.capacity import CapacityResult, find_capacity
from jaxserve.evaluation.figures import timeline
from jaxserve.evaluation.latency import Objective, RunResult
from jaxserve.evaluation.report import Series, capacity_rows, check_can_report, summary_row, text_table, write_report
from jaxserve.request import RequestMetrics

OBJECTIVE = Objective(p99_tbt_seconds=0.2, ttft_seconds=3.0)
VOID = {"meta", "br", "img", "link", "hr", "input"}


def make_run(rate: float, seed: int = 0, num_steps: int = 50, **settings) -> RunResult:
    random = np.random.default_rng(seed)
    requests = [
        RequestMetrics(t, t + 0.1, (t + 0.2 + np.cumsum(random.exponential(0.02 * rate, 20))).tolist())
        for t in range(10)
    ]
    steps = [
        StepRecord(0.1 * i, 0.1 * i, 0.1 * i, 20, 4, 32, device_start_seconds=0.1 * i, ready_seconds=0.1 * i + 0.08)
        for i in range(num_steps)
    ]
    return RunResult(requests, 12.0, 1000, 200, **{"steps": steps, **settings})


@pytest.fixture
def searched() -> list[Series]:
    def search(slowness: float) -> CapacityResult:
        return find_capacity(lambda rate, seed: make_run(rate * slowness, seed), OBJECTIVE, low=0.5, high=8)

    return [
        Series("sarathi", make_run(2.0), 2.0, search(1.0)),
        Series("prefill_first", make_run(4.0), 2.0, search(2.0)),
    ]


class Page(HTMLParser):
    """Checks that tags close, and gathers addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write(tmp_path, series: list[Series], objective: Objective | None = OBJECTIVE) -> tuple[str, dict]:
    settings = {"engine": {"model": "<tiny>", "token_budget": 256}}
    json_path = write_report(str(tmp_path / "report.html"), "A & B", series, objective, settings)
    raw = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return (tmp_path / "report.html").read_text(), raw


def test_the_page_is_well_formed_and_loads_nothing(tmp_path, searched):
    text, _ = write(tmp_path, searched)
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4  # distributions, curves, a timeline for each policy
    for svg in svgs:
        ElementTree.fromstring(svg)


def test_the_page_shows_results_machine_and_configuration(tmp_path, searched):
    text, raw = write(tmp_path, searched)
    page = Page(text)
    for expected in (
        *(
            "A & B",
            "sarathi",
            "prefill_first",
            "200 ms",
            "TTFT at most 3 s",
            "<tiny>",
            "token_budget",
            "Python",
            "numpy",
        ),
        *("TBT (s)", "rate (requests/s)", "rows of the step (tokens)", "Steps of sarathi"),
    ):
        assert expected in page.text
    assert f"{searched[0].capacity.rate:.3g}" in page.text
    assert raw["series"][0]["capacity"]["rate"] == searched[0].capacity.rate
    assert len(raw["series"][1]["run"]["requests"]) == 10
    assert raw["settings"]["engine"]["model"] == "<tiny>"


def test_a_run_with_failures_and_nothing_to_measure(tmp_path):
    run = RunResult([RequestMetrics(0.0, 0.0, [0.1])], 1.0, 5, 1, num_failed=1, errors=["UNAVAILABLE: <gone>"])
    text, raw = write(tmp_path, [Series("127.0.0.1:1", run, None)], None)
    assert "UNAVAILABLE: <gone>" in Page(text).text
    assert raw["series"][0]["run"]["summary"]["tbt"]["seconds"][0] is None
    assert raw["objective"] is None


def test_tables():
    row = summary_row(Series("sarathi", make_run(1.0), 1.0), OBJECTIVE)
    assert (row["policy"], row["rate /s"], row["requests"], row["delay p50 s"]) == ("sarathi", "1", "10", "0.10")
    assert row["output tokens/s"] == "16.7"
    assert summary_row(Series("x", make_run(1.0), None), None)["goodput /s"] == "-"
    assert capacity_rows([Series("x", make_run(1.0), None)]) == []
    table = text_table([{"policy": "a", "rate": "1"}, {"policy": "longer", "rate": "10.5"}])
    assert table == "policy  rate\na          1\nlonger  10.5"


def test_long_timelines_are_averaged():
    assert "50 steps hold, and below how long they take." in timeline(Series("x", make_run(1.0), 1.0)).caption
    many = timeline(Series("x", make_run(1.0, num_steps=2000), None))
    assert "in intervals of 0.5 s: the average" in many.caption
    assert len(many.svg) < 300_000


def test_reports_that_cannot_be_written_are_told_before(tmp_path, monkeypatch):
    check_can_report(str(tmp_path / "report.html"))
    with pytest.raises(ConfigError, match=r"report must be in a folder that exists, got '/no/such/report\.html'"):
        check_can_report("/no/such/report.html")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report needs matplotlib, which the extra 'bench' of jaxserve brings"):
        check_can_report(str(tmp_path / "report.html"))
