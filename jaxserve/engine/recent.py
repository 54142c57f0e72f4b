"""What an engine did of late: its last steps and latencies, for whoever looks on while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

KEPT_STEPS = 512
KEPT_REQUESTS = 256
KEPT_TOKENS = 4096


class Load(NamedTuple):
    """What the engine has to do, and how much of its cache that takes."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0


class RecentStep(NamedTuple):
    """One step: what filled the rows of its program, how long the device had it, and the load when it was launched."""

    number: int
    """From 1 on, in the order in which steps ended."""
    num_decode_tokens: int
    num_prefill_tokens: int
    num_padding_tokens: int
    seconds: float
    load: Load


class Latency(NamedTuple):
    """Percentiles of some seconds; None where there were none."""

    p50: float | None
    p99: float | None
    num_samples: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latency:
        values = np.array(list(seconds))
        if not len(values):
            return cls(None, None, 0)
        p50, p99 = np.percentile(values, (50, 99)).tolist()
        return cls(p50, p99, len(values))


class Recent:
    """A window on the last steps and the last requests that ended.

    The engine's thread writes. Any thread may read: a deque is appended to and copied in one piece, and what it holds
    does not change.
    """

    def __init__(self, token_budget: int, num_blocks: int) -> None:
        """``num_blocks``: KV blocks that requests can have."""
        self.token_budget, self.num_blocks = token_budget, num_blocks
        self.load = Load()
        """As it is now."""
        self.num_steps = 0
        """Since the start, those that are no longer kept included."""
        self._steps: deque[RecentStep] = deque(maxlen=KEPT_STEPS)
        self._prompts: deque[tuple[int, int]] = deque(maxlen=KEPT_REQUESTS)
        """Tokens of each, and how many of them the prefix cache had."""
        self._drafts: deque[tuple[int, int]] = deque(maxlen=KEPT_STEPS)
        """Of each step that had any, how many, and how many of them held."""
        self._ttft_seconds: deque[float] = deque(maxlen=KEPT_REQUESTS)
        self._tbt_seconds: deque[float] = deque(maxlen=KEPT_TOKENS)

    def add_step(
        self, num_decode_tokens: int, num_prefill_tokens: int, num_padding_tokens: int, seconds: float
    ) -> None:
        """A step that has ended; ``load`` is still that of its launch."""
        number = self.num_steps + 1
        self._steps.append(
            RecentStep(number, num_decode_tokens, num_prefill_tokens, num_padding_tokens, seconds, self.load)
        )
        self.num_steps = number

    def add_prompt(self, num_tokens: int, num_cached_tokens: int) -> None:
        """Of a request that has begun."""
        self._prompts.append((num_tokens, num_cached_tokens))

    def add_drafts(self, num_verified: int, num_held: int) -> None:
        """Of a step that had some."""
        self._drafts.append((num_verified, num_held))

    def add_request(self, ttft_seconds: float, tbt_seconds: Iterable[float]) -> None:
        """A request that has ended."""
        self._ttft_seconds.append(ttft_seconds)
        self._tbt_seconds.extend(tbt_seconds)

    def steps_after(self, number: int) -> list[RecentStep]:
        """The kept ones with higher numbers, in order."""
        return [step for step in self._steps.copy() if step.number > number]

    def cached_share(self) -> float | None:
        """Of the prompt tokens of the last requests that began; None before the first one."""
        prompts = self._prompts.copy()
        return sum(cached for _, cached in prompts) / sum(tokens for tokens, _ in prompts) if prompts else None

    def acceptance(self) -> float | None:
        """The share of the last steps' drafts that held; None before the first one."""
        drafts = self._drafts.copy()
        return sum(held for _, held in drafts) / sum(verified for verified, _ in drafts) if drafts else None

    def ttft(self) -> Latency:
        return Latency.of(self._ttft_seconds.copy())

    def tbt(self) -> Latency:
        return Latency.of(self._tbt_seconds.copy())
