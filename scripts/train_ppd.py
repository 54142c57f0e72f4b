"""Train probes for ``--speculative ppd``: a few embeddings for one model, whose weights stay as they are.

train_ppd.py probes.safetensors                                          SmolLM2, on texts that it writes itself
train_ppd.py probes.safetensors --model FOLDER --text a.txt b.txt        on texts of yours
serve.py --model smollm2-135m --speculative ppd --ppd-probes probes.safetensors --num-speculative-tokens 3

A model that chats writes whole conversations: it is given what comes before a user's first word, and goes on from
there, with temperature 1 (arXiv 2406.08464). Others begin with their first token.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError, ModelError, RequestError
from jaxserve.evaluation.report import text_table
from jaxserve.models.loading.checkpoint import open_checkpoint
from jaxserve.models.loading.probes import write_probes
from jaxserve.tokenizer import Tokenizer
from jaxserve.training.dense import DenseModel
from jaxserve.training.probes import TOPS, ProbeTrainer, Text, batches

MARK = "user's words"


def opening(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> list[int]:
    """What a conversation has before a user's first word; of a model that does not chat, what a text begins with."""
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": MARK}])
    except RequestError:
        return tokenizer.encode("") or list(eos_token_ids[:1])
    return tokenizer.encode(chat[: chat.index(MARK)], add_special_tokens=False)


def written_texts(model: str, number: int, length: int) -> list[Text]:
    """By the model itself, of ``length`` tokens each."""
    with LLM(model=model, max_num_seqs=16, token_budget=256, max_model_len=length, show_progress=False) as llm:
        begin = opening(llm.get_tokenizer(), llm.engine.eos_token_ids)
        params = [
            SamplingParams(temperature=1.0, seed=seed, max_tokens=length - len(begin), ignore_eos=True)
            for seed in range(number)
        ]
        outputs = llm.generate([begin] * number, params, use_tqdm=True)
        return [Text([*begin, *output.outputs[0].token_ids], len(begin)) for output in outputs]


def given_texts(paths: Sequence[Path], tokenizer: Tokenizer, number: int, length: int) -> list[Text]:
    """Pieces of files, of ``length`` tokens each, taken at random."""
    tokens = [token for path in paths for token in tokenizer.encode(path.read_text(encoding="utf-8"))]
    starts = np.arange(0, len(tokens) - length + 1, length)
    chosen = np.random.default_rng(0).permutation(starts)[:number]
    return [Text(tokens[start : start + length], 0) for start in chosen.tolist()]


def accuracy_rows(trainer: ProbeTrainer, held_out: Sequence[Text]) -> list[dict[str, str]]:
    return [
        {"probe": str(depth)} | {f"in the top {top}": f"{share:.3f}" for top, share in zip(TOPS, shares, strict=True)}
        for depth, shares in trainer.accuracy(held_out).items()
    ]


def train(args: argparse.Namespace) -> None:
    """Raises ConfigError and ModelError."""
    checkpoint = open_checkpoint(args.model)
    number = args.sequences + args.held_out
    if args.text:
        texts = given_texts(args.text, checkpoint.tokenizer(), number, args.length)
    else:
        texts = written_texts(args.model, number, args.length)
    if len(texts) < args.held_out + args.batch:
        raise ConfigError(
            f"text must hold {args.held_out + args.batch} pieces of {args.length} tokens at least, got {len(texts)}"
        )
    room = args.length - args.probes - max(text.begin for text in texts)
    if args.anchors > room:
        raise ConfigError(f"anchors must not exceed the {room} tokens of a text that have room for one")
    held_out, texts = texts[: args.held_out], texts[args.held_out :]
    config = dataclasses.replace(checkpoint.config, num_probes=args.probes)
    model = DenseModel(checkpoint, config, max_len=args.length)
    plan = list(batches(texts, args.batch, args.epochs))
    trainer = ProbeTrainer(model, num_anchors=args.anchors, num_steps=len(plan), learning_rate=args.learning_rate)
    print(text_table(accuracy_rows(trainer, held_out)), flush=True)
    start = time.monotonic()
    for step, batch in enumerate(plan, 1):
        loss = trainer.step(batch)
        if step % 5 == 0 or step == len(plan):
            print(f"step {step} of {len(plan)}, {time.monotonic() - start:.0f} s: loss {loss:.3f}", flush=True)
            write_probes(args.probes_file, np.asarray(trainer.probes))
    print(text_table(accuracy_rows(trainer, held_out)))
    print(f"wrote {args.probes_file}: {args.probes} probes of {config.hidden_size} numbers")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probes_file", type=Path, help="to write, after every fifth step")
    parser.add_argument("--model", default="smollm2-135m", help="as the engine's")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="to train on; written by the model without"
    )
    parser.add_argument("--probes", type=int, default=3, help="tokens to guess (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=96, help="texts to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=8, help="texts for accuracies (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--anchors", type=int, default=64, help="of a text in a step (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="texts in a step (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="at first (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        train(args)
    except (ConfigError, ModelError, RequestError, OSError) as error:
        print(f"train_ppd.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
