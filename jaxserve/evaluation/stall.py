"""The generation stall (arXiv 2403.02310, figure 1): a long prompt arrives while others decode."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.evaluation.throughput import random_prompts
from jaxserve.request import RequestMetrics
from jaxserve.sampling_params import SamplingParams


@dataclass(frozen=True)
class StallResult:
    tbt_seconds: list[float]
    """Of all decodes, from the arrival of the long prompt to its first token."""
    ttft_seconds: float
    """Of the long prompt."""
    num_stalls: int
    """Steps that left a ready decode out, summed over the decodes."""

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.tbt_seconds, share))


def measure_stall(engine: Engine, *, num_decodes: int, prompt_tokens: int, seed: int = 0) -> StallResult:
    """``num_decodes`` requests are decoding; then a prompt of ``prompt_tokens`` tokens arrives."""
    vocab = engine.model_config.vocab_size
    forever = SamplingParams(temperature=0, max_tokens=prompt_tokens // 4, ignore_eos=True)
    metrics: dict[str, RequestMetrics] = {}
    for index, prompt in enumerate(random_prompts(num_decodes, 32, vocab, seed)):
        engine.add_request(f"decode-{index}", prompt, forever)
    while len(metrics) < num_decodes or min(len(m.token_seconds) for m in metrics.values()) < 8:
        metrics |= {delta.request_id: delta.metrics for delta in engine.step()}
    (long_prompt,) = random_prompts(1, prompt_tokens, vocab, seed + 1)
    engine.add_request("long", long_prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    arrived: RequestMetrics | None = None
    while arrived is None:
        arrived = next((delta.metrics for delta in engine.step() if delta.request_id == "long"), None)
    # One more token of each decode ends the interval that a stall would have stretched.
    first_token = arrived.token_seconds[0]
    while min(m.token_seconds[-1] for m in metrics.values()) <= first_token:
        engine.step()
    gaps = [
        later - earlier
        for m in metrics.values()
        for earlier, later in pairwise(m.token_seconds)
        if later > arrived.arrival_seconds and earlier < first_token
    ]
    stalls = sum(m.num_stalls for m in metrics.values())
    for request_id in metrics:
        engine.abort(request_id)
    while engine.has_unfinished():
        engine.step()
    assert arrived.ttft_seconds is not None
    return StallResult(gaps, arrived.ttft_seconds, stalls)
