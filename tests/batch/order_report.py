"""What ``--first`` is worth, in steps and tokens, which no load changes: ``python -m tests.batch.order_report``.

Two batches on a tiny model, 16 sequences, steps of 64 tokens, 80 blocks of 8 tokens: prompts that begin with one of 40
texts of 40 tokens, in random order; and prompts of 2 to 48 tokens. Outputs have 2 to 16.
"""

from __future__ import annotations

import random
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from jaxserve.batch import FIRST
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.evaluation.throughput import StepTimes
from tests.batch.echo import line, run, write
from tests.batch.tiny_batch import save_tokenizer
from tests.models.golden import Golden

NUM_LINES = 1000


def shared_beginnings(rng: random.Random) -> list[list[int]]:
    beginnings = [[rng.randrange(5, 90) for _ in range(40)] for _ in range(40)]
    return [[*rng.choice(beginnings), *(rng.randrange(5, 90) for _ in range(4))] for _ in range(NUM_LINES)]


def many_lengths(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(5, 90) for _ in range(rng.randrange(2, 49))] for _ in range(NUM_LINES)]


def main() -> None:
    model, rng = Golden("llama_gqa_tied"), random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder)
        sizes = {
            "max_model_len": model.length,
            "token_budget": 64,
            "max_num_seqs": 16,
            "num_blocks": 80,
            "block_size": 8,
        }
        config = EngineConfig(model=str(model.checkpoint), tokenizer=name, **sizes)
        for make in (shared_beginnings, many_lengths):
            body: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
            lengths = [rng.randrange(2, 17) for _ in range(NUM_LINES)]
            lines = [
                line(str(i), prompt=prompt, max_tokens=length, **body)
                for i, (prompt, length) in enumerate(zip(make(rng), lengths, strict=True))
            ]
            source = write(folder / make.__name__, *lines)
            for first in FIRST:
                steps = StepTimes()
                with closing(Engine(config, show_progress=False)) as engine:
                    engine.on_step.append(steps.observe)
                    summary = run(engine, source, folder / f"{make.__name__}-{first}", first=first)
                print(
                    f"{make.__name__}, {first}: {steps.num_steps} steps, {steps.num_tokens} tokens; {summary}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
