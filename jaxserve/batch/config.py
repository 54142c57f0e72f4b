"""The engine's settings where nobody waits for single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.config import EngineConfig, option


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(EngineConfig):
    """As EngineConfig, with other defaults: large steps of many sequences (docs/results/offline.md)."""

    token_budget: int | Literal["auto"] = option(
        "auto",
        "most tokens in one step; auto: the most that meets slo_tbt_seconds, or, without that, that the memory takes",
    )
    max_num_seqs: int = option(64, "most sequences that run at once")
