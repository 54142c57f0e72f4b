"""transformers' generate: static batches, whose shorter prompts are padded and which end with their longest outputs."""

from __future__ import annotations

import time
from typing import Any

import contestant
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria


class Clock(StoppingCriteria):
    """Called after every token; stops none."""

    def __init__(self) -> None:
        self.token_seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.token_seconds.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def start(settings: dict[str, Any]) -> contestant.Round:
    model = AutoModelForCausalLM.from_pretrained(settings["model_folder"], dtype=getattr(torch, settings["dtype"]))
    model.generation_config.eos_token_id = None  # lengths are forced

    def run_batch(requests: list[contestant.Request]) -> None:
        longest = max(len(request.prompt_token_ids) for request in requests)
        pads = [longest - len(request.prompt_token_ids) for request in requests]
        prompts = [[0] * pad + request.prompt_token_ids for pad, request in zip(pads, requests, strict=True)]
        masks = [[0] * pad + [1] * (longest - pad) for pad in pads]
        clock = Clock()
        with torch.inference_mode():
            tokens = model.generate(
                torch.tensor(prompts),
                attention_mask=torch.tensor(masks),
                do_sample=False,
                max_new_tokens=max(request.num_output_tokens for request in requests),
                pad_token_id=0,
                stopping_criteria=[clock],
            )
        for request, row in zip(requests, tokens.tolist(), strict=True):
            request.token_ids = row[longest : longest + request.num_output_tokens]
            request.token_seconds = clock.token_seconds[: request.num_output_tokens]

    def run(requests: list[contestant.Request]) -> None:
        size = settings["max_num_seqs"]
        for first in range(0, len(requests), size):
            run_batch(requests[first : first + size])

    return run


if __name__ == "__main__":
    contestant.main(start, ["transformers", "torch"])
