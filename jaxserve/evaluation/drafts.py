"""What became of the drafts of a run: counted by its own engine's steps, or by a server's metrics."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.engine.metrics import DraftCounts, StepRecord
from jaxserve.evaluation.scrape import scrape

FAMILY = "jaxserve_spec_decode_num_"


def drafts_of(steps: Iterable[StepRecord]) -> DraftCounts:
    """Of all steps together."""
    counts = DraftCounts()
    for step in steps:
        counts.merge(step.drafts)
    return counts


def drafts_at(metrics_url: str) -> DraftCounts:
    """Those of a server's engines since it has started. Raises ConfigError where the address has no metrics."""
    totals: dict[str, float] = {}
    held: dict[int, float] = {}
    for sample in scrape(metrics_url):
        name = sample.name.removeprefix(FAMILY)
        totals[name] = totals.get(name, 0) + sample.value
        if name == "accepted_tokens_per_pos_total":
            place = int(sample.labels["position"])
            held[place] = held.get(place, 0) + sample.value
    num_held = totals.get("accepted_tokens_total", 0)
    return DraftCounts(
        num_sequences=int(totals.get("drafts_total", 0)),
        num_rows=int(totals.get("wasted_rows_total", 0) + num_held),
        num_verified=int(totals.get("draft_tokens_total", 0)),
        num_held=int(num_held),
        held=[int(held.get(place, 0)) for place in range(max(held, default=-1) + 1)],
    )


def drafts_row(drafts: DraftCounts, num_decoded_tokens: int) -> dict[str, str]:
    """``num_decoded_tokens``: output tokens that came with a decode, all but the first of each request."""
    return {
        "drafted": f"{drafts.num_verified}",
        "accepted": f"{drafts.num_held}",
        "acceptance": f"{drafts.acceptance:.0%}",
        "accepted by position": " ".join(f"{number / max(1, drafts.num_sequences):.0%}" for number in drafts.held),
        "wasted rows": f"{drafts.num_rows - drafts.num_held} ({drafts.wasted_share:.0%})",
        "tokens a decode": f"{num_decoded_tokens / max(1, num_decoded_tokens - drafts.num_held):.2f}",
    }
