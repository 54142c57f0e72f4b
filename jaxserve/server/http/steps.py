"""The engines' last steps as JSON, for the page and for whoever looks on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.errors import RequestError

if TYPE_CHECKING:
    from jaxserve.engine.recent import Load, Recent, RecentStep


def recent_steps(engines: Sequence[Recent], query: Mapping[str, str]) -> dict[str, Any]:
    """The kept steps of one ``engine``, 0 by default, that are numbered after ``since``, by default all; and a summary
    of it. Raises RequestError.
    """
    recent = engines[integer(query, "engine", len(engines) - 1)]
    return {
        "num_engines": len(engines),
        "token_budget": recent.token_budget,
        "num_kv_blocks": recent.num_blocks,
        "last_step": recent.num_steps,
        **recent.load._asdict(),
        "cached_share": recent.cached_share(),
        "acceptance": recent.acceptance(),
        "ttft_seconds": recent.ttft()._asdict(),
        "tbt_seconds": recent.tbt()._asdict(),
        "steps": [_step(step) for step in recent.steps_after(integer(query, "since", 2**53))],
    }


def _step(step: RecentStep) -> dict[str, Any]:
    fields = step._asdict()
    load: Load = fields.pop("load")
    return {**fields, **load._asdict()}


def integer(query: Mapping[str, str], name: str, high: int, *, low: int = 0, default: int = 0) -> int:
    """What ``name`` is in a query. Raises RequestError."""
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and low <= int(text) <= high):
        raise RequestError(f"{name} must be an integer in [{low}, {high}], got {text!r:.80}")
    return int(text)
