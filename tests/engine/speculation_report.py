"""By hand: outputs with drafts beside those without, token for token.

    python -m tests.engine.speculation_report FOLDER

Prompts are of this project's pages and code, some of which repeat themselves; they are continued in turns greedily and
with a seed, by the model alone, with n-grams as drafts, with n-grams of which every fifth token is wrong and some are
missing, and with suffixes. Drafts are granted wherever there is a row. FOLDER keeps the prompts and what has been
computed, piece by piece: who is interrupted, goes on there.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxserve import LLM, SamplingParams
from jaxserve.engine import speculation
from jaxserve.engine.metrics import DraftCounts, StepRecord
from jaxserve.engine.profiling import Profiler
from jaxserve.engine.speculation import PROPOSERS, Draws, Proposal, Proposer, SequenceState, ngrams
from jaxserve.evaluation.report import text_table
from jaxserve.scheduler.step_time import StepTimeModel

ROOT = Path(__file__).parents[2]
PLAIN = "off"
FLAT = StepTimeModel({1: 1.0, 64: 1.0}, 0.0, 0.0)
"""Rows cost nothing: how many drafts are granted does not depend on how busy this machine is."""


def corrupted(sequences: SequenceState[jax.Array], num_speculative_tokens: int, _: Draws) -> Proposal:
    """N-grams with wrong tokens, and fewer than there are."""
    found = ngrams(sequences, num_speculative_tokens)
    noise = (sequences.lengths[:, None] + jnp.arange(num_speculative_tokens)) * 7919
    counts = jnp.minimum(found.counts, sequences.lengths * 31 % (num_speculative_tokens + 1))
    return Proposal(jnp.where(noise % 1009 % 5 == 0, noise % 49152, found.token_ids), counts)


CASES: Mapping[str, tuple[str, Proposer | None]] = {
    "ngram": ("ngram", PROPOSERS["ngram"]), "corrupted": ("ngram", corrupted), "suffix": ("suffix", None),
}  # fmt: skip
"""The option ``speculative``, and what proposes on the device."""


def make_prompts(number: int) -> list[str]:
    pick, found = random.Random(0), list[str]()
    texts = [path.read_text(encoding="utf-8") for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("jaxserve/**/*.py")])]
    texts = [text for text in texts if len(text) > 1500]
    while len(found) < number:
        text = pick.choice(texts)
        start = pick.randrange(len(text) - 1200)
        prompt = text[start : start + pick.choice([60, 200, 600, 1000])]
        repeated, story = f"{prompt}\n\nThe same again:\n{prompt[:40]}", f"Write a story about {prompt[:30]}"
        found.append((prompt, repeated, story)[len(found) % 3])
    return found


def params_of(index: int, num_tokens: int) -> SamplingParams:
    """Greedy, and with a seed, in turns."""
    if index % 2 == 0:
        return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return SamplingParams(temperature=0.8, top_p=0.9, seed=index, max_tokens=num_tokens, ignore_eos=True)


class Pieces:
    """What has been computed of each case, in files of ``size`` prompts."""

    def __init__(self, folder: Path, num_prompts: int, size: int, num_tokens: int) -> None:
        self._folder, self._num_tokens = folder, num_tokens
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "prompts.json"
        if not path.exists():
            self._write(path, make_prompts(num_prompts))
        prompts: list[str] = json.loads(path.read_text())[:num_prompts]
        self._pieces = [dict(list(enumerate(prompts))[at : at + size]) for at in range(0, len(prompts), size)]

    def complete(self, case: str, proposer: Proposer | None, **options: Any) -> None:
        """Compute the missing ones."""
        missing = [piece for piece in self._pieces if not self._path(case, piece).exists()]
        if not missing:
            return
        with (
            mock.patch.object(Profiler, "draft_times", return_value=FLAT),
            mock.patch.dict(speculation.PROPOSERS, {} if proposer is None else {"ngram": proposer}),
            LLM(model="smollm2-135m", token_budget=64, max_num_seqs=16, max_model_len=640, num_blocks=260,
                show_progress=False, **options) as llm,
        ):  # fmt: skip
            for piece in missing:
                self._compute(llm, case, piece)

    def results(self, case: str) -> list[dict[str, Any]]:
        return [json.loads(self._path(case, piece).read_text()) for piece in self._pieces]

    def _compute(self, llm: LLM, case: str, piece: Mapping[int, str]) -> None:
        drafts, num_steps = DraftCounts(), 0

        def watch(step: StepRecord, _: object) -> None:
            nonlocal num_steps
            num_steps += 1
            drafts.merge(step.drafts)

        llm.engine.on_step.append(watch)
        params = [params_of(index, self._num_tokens) for index in piece]
        outputs = llm.generate(list(piece.values()), params, use_tqdm=False)
        llm.engine.on_step.remove(watch)
        self._write(self._path(case, piece), {
            "token_ids": [output.outputs[0].token_ids for output in outputs], "steps": num_steps,
            "preemptions": sum(output.metrics.num_preemptions for output in outputs),
            "drafted": drafts.num_verified, "accepted": drafts.num_held, "compiled": llm.engine.compiles.count,
        })  # fmt: skip
        print(f"{case}: prompts {min(piece)} to {max(piece)}", flush=True)

    def _path(self, case: str, piece: Mapping[int, str]) -> Path:
        return self._folder / f"{case}-{self._num_tokens}-{min(piece)}-{max(piece)}.json"

    @staticmethod
    def _write(path: Path, value: object) -> None:
        """All of it or nothing."""
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(value))
        beside.rename(path)


def differences(want: list[list[int]], got: list[list[int]]) -> dict[int, int]:
    """By prompt whose tokens differ, the place of the first one that does."""
    return {
        index: next((i for i, (one, other) in enumerate(zip(*pair, strict=False)) if one != other), min(map(len, pair)))
        for index, pair in enumerate(zip(want, got, strict=True))
        if pair[0] != pair[1]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--piece", type=int, default=50, help="prompts that are computed at once")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3, 7], help="most of a sequence in a step")
    args = parser.parse_args()
    pieces = Pieces(args.folder, args.prompts, args.piece, args.tokens)
    pieces.complete(PLAIN, None)
    cases = {f"{name}-{most}": (*case, most) for name, case in CASES.items() for most in args.drafts}
    for case, (speculative, proposer, most) in cases.items():
        pieces.complete(case, proposer, speculative=speculative, num_speculative_tokens=most)
    rows, told = [], []
    want = [ids for result in pieces.results(PLAIN) for ids in result["token_ids"]]
    for case in (PLAIN, *cases):
        results = pieces.results(case)
        found = differences(want, [ids for result in results for ids in result["token_ids"]])
        names = ("steps", "preemptions", "drafted", "accepted", "compiled")
        rows.append(
            {"drafts": case, "prompts": f"{len(want)}", "differing": f"{len(found)}"}
            | {name: f"{sum(result[name] for result in results)}" for name in names}
        )
        told += [f"{case}: prompt {index} differs from token {place} on" for index, place in found.items()]
    print(text_table(rows), *told, sep="\n")


if __name__ == "__main__":
    main()
