"""Reads what a server shows to Prometheus."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from jaxserve.errors import ConfigError

TIMEOUT_SECONDS = 30.0


def scrape(metrics_url: str) -> list[Sample]:
    """All samples there, from the machine itself: proxies are for others. Raises ConfigError where there are none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(metrics_url, timeout=TIMEOUT_SECONDS) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"metrics_url must be where a server shows its metrics, got {metrics_url!r}: {error}"
        ) from error
    return [sample for family in families for sample in family.samples]
