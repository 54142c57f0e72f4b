"""Whole tiny models in float32, token for token as transformers computes them: the files of tests/golden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.evaluation.gpu_check.stage import ROOT, Context, StageFailed
from jaxserve.sampling_params import SamplingParams

FOLDER = ROOT / "tests" / "golden" / "tiny"
NEAR_TIE = 1e-3
"""Logits closer than this may be ordered either way by float32 sums in another order."""
CHECKPOINTS = ("mistral_window", "llama_gqa_wide_heads", "gemma2_softcap")


def run(context: Context) -> None:
    names = CHECKPOINTS[:1] if context.tiny else CHECKPOINTS
    tokenizer = context.out / "tokenizer"
    _write_tokenizer(tokenizer)
    right = {name: _greedy_agrees(name, tokenizer) for name in names}
    for name, agrees in right.items():
        context.records.add("golden", checkpoint=name, right=agrees)
    if not all(right.values()):
        raise StageFailed(f"other tokens than transformers: {', '.join(n for n in right if not right[n])}")


def _write_tokenizer(folder: Path) -> None:
    """Of the checkpoints' 96 tokens: they have none, and an engine needs one."""
    folder.mkdir()
    words = {f"<{i}>": i for i in range(96)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>")).save(str(folder / "tokenizer.json"))


def _greedy_agrees(name: str, tokenizer: Path) -> bool:
    """Token by token, of a prompt in chunks of the budget, up to one that was nearly another."""
    expected = np.load(FOLDER / name / "expected.npz")
    prompt, greedy, gaps = (expected[array].tolist() for array in ("input_ids", "greedy_ids", "greedy_gaps"))
    config = EngineConfig(
        model=str(FOLDER / name),
        tokenizer=str(tokenizer),
        dtype="float32",
        token_budget=16,
        max_num_seqs=2,
        block_size=16,
        num_blocks=32,
        max_model_len=len(prompt) + len(greedy),
    )
    engine = Engine(config, show_progress=False)
    engine.add_request("golden", prompt, SamplingParams(temperature=0, max_tokens=len(greedy), ignore_eos=True))
    tokens: list[int] = []
    while engine.has_unfinished():
        tokens += [token for delta in engine.step() for token in delta.token_ids]
    engine.close()
    differs = next((i for i, (ours, theirs) in enumerate(zip(tokens, greedy, strict=True)) if ours != theirs), None)
    return differs is None or gaps[differs] < NEAR_TIE
