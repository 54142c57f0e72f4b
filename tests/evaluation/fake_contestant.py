"""A contestant without a model: a token is the one before plus one. The first argument says how it misbehaves."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "peers"))

import contestant

STEP_SECONDS = 0.002


class Fake:
    def __init__(self, manner: str) -> None:
        self.manner = manner
        self.running: dict[int, list[int]] = {}
        self.num_added = 0

    def add(self, index: int, prompt_token_ids: list[int], num_output_tokens: int) -> None:
        self.num_added += 1
        if self.manner == "dies" and self.num_added > 4:
            raise MemoryError("no room for the KV cache")
        if self.manner == "hangs":
            time.sleep(60)
        self.running[index] = [prompt_token_ids[-1], num_output_tokens]

    def step(self) -> Iterable[tuple[int, list[int]]]:
        if self.manner == "chats":
            print("a library that prints to stdout")
        time.sleep(STEP_SECONDS)
        tokens = []
        for index, state in list(self.running.items()):
            state[0], state[1] = state[0] + 1, state[1] - 1
            tokens.append((index, [state[0]]))
            if not state[1]:
                del self.running[index]
        return tokens


def stops_short(requests: list[contestant.Request]) -> None:
    for request in requests:
        request.token_ids, request.token_seconds = [1], [time.monotonic()]


if __name__ == "__main__":
    if sys.argv[1] == "no model":
        sys.exit("cannot read the model")
    contestant.main(
        lambda settings: stops_short if sys.argv[1] == "stops" else contestant.stepped(Fake(sys.argv[1])), ["numpy"]
    )
