"""OpenVINO GenAI on the GGUF file itself, whose 4-bit weights it keeps: continuous batching with chunked prefill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import contestant
import numpy as np
import openvino
import openvino_genai as genai


class OpenVINO:
    def __init__(self, settings: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = settings["token_budget"]
        scheduler.max_num_seqs = settings["max_num_seqs"]
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1  # GB
        self.pipeline = genai.ContinuousBatchingPipeline(settings["model_file"], scheduler, "CPU")
        self.handles: dict[int, genai.GenerationHandle] = {}

    def add(self, index: int, prompt_token_ids: list[int], num_output_tokens: int) -> None:
        params = genai.GenerationConfig()
        params.max_new_tokens = num_output_tokens
        params.ignore_eos = True
        params.do_sample = False
        prompt = openvino.Tensor(np.array([prompt_token_ids], np.int64))
        self.handles[index] = self.pipeline.add_request(index, prompt, params)

    def step(self) -> Iterable[tuple[int, list[int]]]:
        self.pipeline.step()
        tokens = []
        for index, handle in list(self.handles.items()):
            if handle.can_read():
                (output,) = handle.read().values()
                tokens.append((index, list(output.generated_ids)))
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del self.handles[index]
        return tokens


if __name__ == "__main__":
    contestant.main(lambda settings: contestant.stepped(OpenVINO(settings)), ["openvino-genai", "openvino"])
