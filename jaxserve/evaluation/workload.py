"""What is asked of a server: requests with lengths and arrival times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload; its output length is forced."""

    arrival_seconds: float
    """After the start of the run."""
    num_prompt_tokens: int
    num_output_tokens: int
