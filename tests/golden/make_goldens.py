"""Write the reference outputs that the tests compare the engine with.

Run it in an environment of its own: it needs torch and transformers (with gguf and accelerate), which neither
jaxserve nor its tests install. The versions used last are in README.md and in the files themselves.

    python tests/golden/make_goldens.py --gguf smollm2.gguf            # everything
    python tests/golden/make_goldens.py --gguf smollm2.gguf --only tiny

Two references, both float32 on the CPU with transformers' eager attention:

smollm2_greedy.json  greedy continuations by SmolLM2-135M-Instruct, on the dequantised weights of the GGUF file.
llama_tiny/<case>/   random Llama models of a few KB, one for each kind of attention, bias, tying and rope scaling.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

MAX_NEW_TOKENS = 48
TINY_NEW_TOKENS = 16
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


@dataclass(frozen=True)
class TinyCase:
    """One random Llama model; `prompt_length` + 16 greedy tokens are evaluated."""

    heads: int
    kv_heads: int
    head_dim: int = 8
    prompt_length: int = 48
    layers: int = 2
    tied: bool = False
    bias: bool = False
    max_positions: int = 128
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    legacy_config: bool = False  # config.json with rope_theta and rope_scaling, as transformers 4 wrote it
    dtype: torch.dtype = torch.bfloat16  # of the weights in the file; everything is computed in float32


ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, **ORIGINAL}
LONGROPE |= {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.0, 3.0, 4.0]}

# head_dim 8 with rope_theta 1000 turns by 1, 0.18, 0.03, 0.006 rad a token: over 64 tokens every kind of scaling shows.
TINY_CASES = {
    "mha_untied": TinyCase(heads=4, kv_heads=4, dtype=torch.float32),
    "gqa_tied": TinyCase(heads=4, kv_heads=2, layers=3, tied=True, dtype=torch.float32),
    "mqa_bias": TinyCase(heads=4, kv_heads=1, bias=True, dtype=torch.float32, legacy_config=True),
    "gqa_wide_heads": TinyCase(heads=4, kv_heads=2, head_dim=16),  # heads * head_dim != hidden_size
    "rope_linear": TinyCase(heads=4, kv_heads=2, tied=True, rope={"rope_type": "linear", "factor": 4.0}),
    "rope_dynamic": TinyCase(heads=4, kv_heads=2, max_positions=32, rope={"rope_type": "dynamic", "factor": 4.0}),
    "rope_yarn": TinyCase(heads=4, kv_heads=2, head_dim=16, tied=True, rope=YARN),
    "rope_longrope_short": TinyCase(heads=4, kv_heads=1, prompt_length=16, tied=True, rope=LONGROPE),
    "rope_longrope_long": TinyCase(heads=4, kv_heads=2, tied=True, rope=LONGROPE, legacy_config=True),
    "rope_llama3": TinyCase(heads=4, kv_heads=2, head_dim=16, tied=True, rope=LLAMA3, legacy_config=True),
}


def best_gap(logits: torch.Tensor) -> list[float]:
    """Distance from the best to the second-best logit of each row: logits [n, vocab] -> n numbers."""
    best = logits.float().topk(2, dim=-1).values
    return [round(gap, 6) for gap in (best[:, 0] - best[:, 1]).tolist()]


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


def make_tiny(out: Path, name: str, case: TinyCase, seed: int) -> None:
    """Write llama_tiny/<name>/: config.json, model.safetensors and expected.npz."""
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=case.max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=case.tied,
        attention_bias=case.bias,
        mlp_bias=case.bias,
        rope_parameters={"rope_theta": 1000.0, **case.rope},
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_((1 + noise if "norm" in parameter_name else noise).to(case.dtype))
    sequence = torch.randint(0, config.vocab_size, (1, case.prompt_length), generator=generator)
    length = case.prompt_length + TINY_NEW_TOKENS
    # Dynamic NTK takes its frequencies from the longest sequence seen so far; seeing the final length first makes them
    # the same for every step. The other kinds keep no such memory.
    model(torch.zeros(1, length, dtype=torch.long))
    while sequence.shape[1] < length:
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(dim=-1)], dim=1)
    logits = model(sequence).logits[0]
    greedy = sequence[0, case.prompt_length :]
    steps = logits[case.prompt_length - 1 : -1]
    assert torch.equal(steps.argmax(dim=-1), greedy), f"{name}: the continuation is not greedy"

    folder = out / "llama_tiny" / name
    model.to(case.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if case.legacy_config:
        saved = json.loads((folder / "config.json").read_text())
        rope = saved.pop("rope_parameters")
        saved["rope_theta"] = rope.pop("rope_theta")
        saved["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (folder / "config.json").write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert torch.allclose(again(sequence).logits[0], logits, atol=1e-5), f"{name}: the saved folder differs"
    np.savez_compressed(
        folder / "expected.npz",
        input_ids=sequence[0, : case.prompt_length].numpy().astype(np.int32),
        greedy_ids=greedy.numpy().astype(np.int32),
        greedy_gaps=np.asarray(best_gap(steps), np.float32),
        logits=logits.numpy(),
    )
    print(f"{name}: logits std {logits.std():.2f}, smallest gap {min(best_gap(steps)):.4f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct, Q4_1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=["smollm2", "tiny"])
    args = parser.parse_args()
    with torch.inference_mode():
        if args.only != "smollm2":
            for seed, (name, case) in enumerate(TINY_CASES.items()):
                make_tiny(args.out, name, case, seed)
        if args.only != "tiny":
            make_smollm2(args.gguf, args.out)


if __name__ == "__main__":
    main()
