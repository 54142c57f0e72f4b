"""transformers' generate: one batch of all requests, which must come at once and be of one length."""

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

    def run(requests: list[contestant.Request]) -> None:
        prompts = torch.tensor([request.prompt_token_ids for request in requests])
        clock, length = Clock(), requests[0].num_output_tokens
        with torch.inference_mode():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=length,
                pad_token_id=0,
                stopping_criteria=[clock],
            )
        for request, row in zip(requests, tokens.tolist(), strict=True):
            request.token_ids, request.token_seconds = row[-length:], clock.token_seconds

    return run


if __name__ == "__main__":
    contestant.main(start, ["transformers", "torch"])
