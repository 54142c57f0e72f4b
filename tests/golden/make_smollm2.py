"""Write smollm2_greedy.json: greedy continuations by SmolLM2-135M-Instruct, on a GGUF file's dequantised weights.

Run it in an environment of its own: it needs torch and transformers (with gguf and accelerate), which neither
jaxserve nor its tests install. The versions used last are in the file itself. Everything is computed by transformers
in float32 on the CPU, with eager attention.

    python tests/golden/make_smollm2.py --gguf smollm2.gguf
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from reference import best_gap
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 48
PROMPT_LOGPROBS_CASE = "raw_code"
SYSTEM = {"role": "system", "content": "You are a pirate. Answer every question in one short sentence."}

DAYS = (
    f"{day}. On day {day} the ship sailed {17 * day % 90 + 10} miles to the {('north', 'south', 'east')[day % 3]}. The "
    f"crew saw {3 * day} {('whales', 'islands', 'gulls', 'ice floes')[day % 4]}, the captain wrote two pages, and the "
    f"cook served {('salted fish', 'rice and beans', 'turtle soup')[day % 3]} for dinner."
    for day in range(1, 15)
)
RAW_PROMPTS = {
    "raw_short": "The capital of France is",
    "raw_code": 'def fibonacci(n):\n    """The first n Fibonacci numbers."""\n    numbers = [0,  1]\n    while len(',
    "raw_one_token": "Once",
    "raw_unicode": "Le café de la forêt coûte 12 €. 世界 means world 🌍, and the Greek word for love is",
    "raw_long": "Notes from a voyage in 1847:\n\n" + "\n\n".join(DAYS) + "\n\n15. On day 15 the ship",
}
CHAT_PROMPTS: dict[str, list[dict[str, str]]] = {
    "chat_question": [{"role": "user", "content": "Why is the sky blue?"}],
    "chat_ends_early": [{"role": "user", "content": "What is the capital of Italy? Answer with one word."}],
    "chat_system": [SYSTEM, {"role": "user", "content": "How do I cook an egg?"}],
    "chat_turns": [
        {"role": "user", "content": "Give me three prime numbers."},
        {"role": "assistant", "content": "2, 3 and 5."},
        {"role": "user", "content": "Now write a Python list with the next four."},
    ],
}


def chosen_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> list[float]:
    """Log-probability of token_ids [n] under logits [n, vocab]."""
    logprobs = logits.float().log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]
    return [round(logprob, 6) for logprob in logprobs.tolist()]


def load_tokenizer(gguf: Path) -> Any:
    """The GGUF file's tokenizer, with the pre-tokenizer that the file names.

    transformers' GGUF reader gives every `gpt2` vocabulary GPT-2's own pre-tokenizer. SmolLM was trained with one that
    also isolates each digit, which changes how spaces and newlines in front of a digit are merged.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def smollm2_case(model: Any, tokenizer: Any, name: str, prompt: str) -> dict[str, Any]:
    """Continue one prompt greedily, and check the cached decode against one forward pass over the whole sequence."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([prompt_ids])
    made = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    step_logits = torch.cat(made.logits)
    output = made.sequences[0, len(prompt_ids) :]
    whole = model(made.sequences).logits[0]
    difference = (whole[len(prompt_ids) - 1 : -1] - step_logits).abs().max().item()
    assert difference < 1e-3, f"{name}: cached and whole forward passes differ by {difference}"
    case = {
        "name": name,
        "prompt": prompt,
        "prompt_token_ids": prompt_ids,
        "output_token_ids": output.tolist(),
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "finish_reason": "stop" if output[-1].item() == model.config.eos_token_id else "length",
        "gaps": best_gap(step_logits),
        "logprobs": chosen_logprobs(step_logits, output),
    }
    if name == PROMPT_LOGPROBS_CASE:
        rows = whole[: len(prompt_ids) - 1]
        case["prompt_logprobs"] = [None, *chosen_logprobs(rows, inputs[0, 1:])]
    print(f"{name}: {len(prompt_ids)} + {len(output)} tokens, smallest gap {min(case['gaps']):.4f}: {case['text']!r}")
    return case


def make_smollm2(gguf: Path, out: Path) -> None:
    """Write smollm2_greedy.json into `out`."""
    tokenizer = load_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = [smollm2_case(model, tokenizer, name, prompt) for name, prompt in RAW_PROMPTS.items()]
    for name, messages in CHAT_PROMPTS.items():
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        cases.append({**smollm2_case(model, tokenizer, name, prompt), "messages": messages})
    header = {
        "gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")},
        "max_new_tokens": MAX_NEW_TOKENS,
        "eos_token_id": model.config.eos_token_id,
    }
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    text = json.dumps(header, indent=1).removesuffix("\n}") + f',\n "cases": [\n{lines}\n]}}\n'
    (out / "smollm2_greedy.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct, Q4_1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    with torch.inference_mode():
        make_smollm2(args.gguf, args.out)


if __name__ == "__main__":
    main()
