"""jaxserve itself, no prefix cache, its engine in this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import contestant

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.sampling_params import SamplingParams


class JaxServe:
    def __init__(self, settings: dict[str, Any]) -> None:
        names = ("model", "dtype", "token_budget", "max_num_seqs", "max_model_len")
        # The rounds repeat their prompts; the others' caches are off as well.
        config = EngineConfig(**{name: settings[name] for name in names}, enable_prefix_caching=False)
        self.engine = Engine(config, show_progress=False)

    def add(self, index: int, prompt_token_ids: list[int], num_output_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
        self.engine.add_request(str(index), prompt_token_ids, params)

    def step(self) -> Iterable[tuple[int, list[int]]]:
        return [(int(delta.request_id), delta.token_ids) for delta in self.engine.step()]


if __name__ == "__main__":
    contestant.main(lambda settings: contestant.stepped(JaxServe(settings)), ["jaxserve", "jax"])
