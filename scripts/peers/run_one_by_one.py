"""jaxserve for those who call ``LLM.generate`` with one prompt after the other."""

from __future__ import annotations

import time
from typing import Any

import contestant

from jaxserve import LLM, SamplingParams


def start(settings: dict[str, Any]) -> contestant.Round:
    names = ("model", "dtype", "token_budget", "max_num_seqs", "max_model_len")
    chosen = {name: settings[name] for name in names}
    llm = LLM(**chosen, enable_prefix_caching=False, show_progress=False)

    def run(requests: list[contestant.Request]) -> None:
        for request in requests:
            params = SamplingParams(temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True)
            (output,) = llm.generate([request.prompt_token_ids], params, use_tqdm=False)
            request.token_ids = output.outputs[0].token_ids
            request.token_seconds = [time.monotonic()] * request.num_output_tokens

    return run


if __name__ == "__main__":
    contestant.main(start, ["jaxserve", "jax"])
