"""What every contestant of compare.py shares: settings in, rounds of requests in, their tokens and times out.

Contestants run in environments of their own, without jaxserve, so this uses the standard library alone. The settings
are the last argument, as JSON; a round is a line of JSON on stdin, its answer a line on stdout, all in tokens and
seconds:

    <- {"ready": {"package": "1.2.3"}}
    -> {"requests": [{"arrival_seconds": 0.0, "prompt_token_ids": [5, 9], "num_output_tokens": 2}]}
    <- {"requests": [{"arrival_seconds": 7.5, "token_seconds": [7.6, 7.7], "token_ids": [4, 4]}]}

Arrivals are asked for after the start of the round, and answered on the contestant's clock, as tokens are.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol


@dataclass
class Request:
    """A request under way; it ends after ``num_output_tokens``, whatever these are."""

    arrival_seconds: float
    prompt_token_ids: list[int]
    num_output_tokens: int
    token_seconds: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Stepper(Protocol):
    """An engine that is driven step by step; ``index`` is a number that no earlier request had."""

    def add(self, index: int, prompt_token_ids: list[int], num_output_tokens: int) -> None: ...

    def step(self) -> Iterable[tuple[int, list[int]]]:
        """One step; the new tokens of each request that has any, by its index."""
        ...


Round = Callable[[list[Request]], None]
"""Runs requests, whose arrivals are on the clock by then, and fills in their tokens."""


def stepped(engine: Stepper) -> Round:
    """Rounds of an open loop: what has arrived joins between two steps; tokens come when their step returns."""
    count = 0

    def run(requests: list[Request]) -> None:
        nonlocal count
        waiting, running = list(reversed(requests)), {}
        while waiting or running:
            while waiting and waiting[-1].arrival_seconds <= time.monotonic():
                count += 1
                running[count] = request = waiting.pop()
                engine.add(count, request.prompt_token_ids, request.num_output_tokens)
            if not running:
                time.sleep(max(0.0, waiting[-1].arrival_seconds - time.monotonic()))
                continue
            tokens = engine.step()
            now = time.monotonic()
            for index, token_ids in tokens:
                request = running[index]
                request.token_ids += token_ids
                request.token_seconds += [now] * len(token_ids)
                if len(request.token_ids) >= request.num_output_tokens:
                    del running[index]

    return run


def main(start: Callable[[dict[str, Any]], Round], packages: Iterable[str]) -> None:
    """``start`` loads the model by the settings; then rounds are run until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    run = start(json.loads(sys.argv[-1]))
    print(json.dumps({"ready": {package: version(package) for package in packages}}), file=answers)
    for line in sys.stdin:
        started = time.monotonic()
        requests = [Request(**asked) for asked in json.loads(line)["requests"]]
        for request in requests:
            request.arrival_seconds += started
        run(requests)
        names = ("arrival_seconds", "token_seconds", "token_ids")
        done = [{name: getattr(request, name) for name in names} for request in requests]
        print(json.dumps({"requests": done}), file=answers)
