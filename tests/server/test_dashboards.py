"""The dashboard and the alerts in docs/deploy: their queries parse, and ask for what servers show."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import RunningServer
from tests.server.test_http import send
from tests.server.test_metrics import finished_request

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
OF_SCRAPES = {"job", "instance"}
"""Labels that Prometheus itself gives to every sample."""
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
(GROUP,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
SHOWN = [(target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]]
ALERTED = [(rule["expr"], " ".join(rule["annotations"].values())) for rule in GROUP["rules"]]


@pytest.fixture
def labels(make_server: Callable[..., RunningServer]) -> Mapping[str, set[str]]:
    """By sample, those it has, of servers with one engine and with two."""
    labels = defaultdict(set, {"up": set(OF_SCRAPES)})
    for num_engines in (1, 2):
        server = make_server(http_port=0, num_engines=num_engines)
        for engine in server.engines:
            engine.metrics.observe_request(finished_request())
            engine.metrics.startup.labels("compile").set(1.0)
        send(server, "GET", "/health")
        for family in text_string_to_metric_families(send(server, "GET", "/metrics")[2].decode()):
            for sample in family.samples:
                labels[sample.name] |= OF_SCRAPES | set(sample.labels)
    return labels


def nodes(query: str) -> Iterator[Any]:
    """Of the syntax tree, without Grafana's variables."""
    found: list[Any] = []
    promql.walk(promql.parse(query.replace("$__rate_interval", "5m")), found.append)
    for node in found:
        yield node.vector_selector if isinstance(node, promql.MatrixSelector) else node


def test_queries_ask_for_what_servers_show(labels: Mapping[str, set[str]]) -> None:
    for query, text in SHOWN + ALERTED:
        tree = list(nodes(query))
        selectors = [node for node in tree if isinstance(node, promql.VectorSelector)]
        assert selectors, query
        aggregates = [node for node in tree if isinstance(node, promql.AggregateExpr) and node.modifier is not None]
        grouped = {name for node in aggregates for name in node.modifier.labels}
        named = set(re.findall(r"{{ *(?:\$labels\.)?(\w+) *}}", text))
        for selector in selectors:
            assert selector.name in labels, query
            wanted = grouped | named | {matcher.name for matcher in selector.matchers.matchers}
            assert wanted <= labels[selector.name], (query, wanted - labels[selector.name])


def test_the_dashboard_is_for_any_data_source_and_server() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for query, _ in SHOWN:
        for node in nodes(query):
            if isinstance(node, promql.VectorSelector):
                matchers = {matcher.name: matcher.value for matcher in node.matchers.matchers}
                assert matchers.items() >= {"job": "$job", "instance": "$instance"}.items()


def test_alerts_have_what_receivers_go_by() -> None:
    for rule in GROUP["rules"]:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
