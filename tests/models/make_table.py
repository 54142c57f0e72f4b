"""Write docs/models.md: what is served, and how far every reference checkpoint's logits are from transformers'.

python -m tests.models.make_table
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.loading.gguf import ARCHITECTURES
from jaxserve.models.registry import FAMILIES
from tests.models.golden import SAME_AS, Golden, names

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Models

Made by `python -m tests.models.make_table` from models/registry.py and the reference checkpoints of tests/golden: tiny
random models whose logits, and greedy continuation of 16 tokens, transformers computed in float32
(tests/golden/README.md says how, and what could be proven of each). The same comparison is
tests/models/test_families.py, which also serves one of each architecture through the engine.

Any of these loads from safetensors (a folder or a hub id) and, converted, from Orbax onto any mesh; GGUF where the
table says so. `--load-format dummy` gives random weights in the shape of any config.json, or of mistral-7b, yi-34b,
llama2-70b, falcon-180b, deepseek-v2-lite and qwen3-30b-a3b by name.

## Families

| models | architecture in config.json | GGUF | verified by |
|---|---|---|---|
"""
CASES = """
## Files

What the files of a model say is taken together, as transformers, vLLM and llama.cpp take it:

- **Ends of outputs.** The union of `eos_token_id` in generation_config.json and config.json (numbers, strings or
  lists), `eos_token` in tokenizer_config.json and special_tokens_map.json, a GGUF file's eos, eot and eom ids, and
  tokens that end a turn or a document in any vocabulary that has them (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>` and
  others of llama.cpp's list, models/loading/eos.py). One line of the log names them. `--generation-config none`
  leaves out sampling defaults only.
- **Tokens.** tokenizer.json, and beside it the tokens of tokenizer_config.json (`added_tokens_decoder`,
  `extra_special_tokens`, names like `pad_token`), special_tokens_map.json and added_tokens.json. The chat template is
  that of chat_template.jinja, tokenizer_config.json or chat_template.json, the first that there is.
- **Heads.** With `tie_word_embeddings` true, a head in the files that differs from the embedding is used, with a
  warning, and a head without an embedding is both. Names may have the model's prefix (`model.`, `transformer.`) or not.
- **Quantised weights** are dequantised as they are loaded, or stay as they are: [quantization.md](quantization.md).
- **GGUF.** A model in parts (`-00001-of-00003.gguf`) loads by the name of any of them. Texts are split as
  `tokenizer.ggml.pre` says, which may be the name of Llama 3, Qwen, DeepSeek, Mistral (tekken) and others
  (models/loading/gguf_pretokenizers.py).

A value of another type, a damaged or missing file, a Git LFS pointer in its place: refused, with the file, the key and
what was found.

## Reference checkpoints

Largest absolute difference of any logit from transformers', with prompt and continuation in one step, in chunks of
5, 1, 16 and the rest, and token by token; the limit is 1e-3. *Greedy*: the continuation is the same, token for token.

| case | what it has | largest logit | one step | chunks | token by token | greedy |
|---|---|---|---|---|---|---|
"""


def features(config: ModelConfig) -> str:
    """What sets a model apart, in words."""
    if config.latent is not None:
        found = [f"MLA {config.num_heads}, a latent of {config.latent.rank}"]
    else:
        heads = "MHA" if config.group_size == 1 else "MQA" if config.num_kv_heads == 1 else "GQA"
        found = [f"{heads} {config.num_heads}/{config.num_kv_heads}"]
    windowed = sum(window is not None for window in config.windows)
    if windowed:
        found.append(f"window in {windowed} of {config.num_layers} layers")
    if config.local_heads is not None:
        found.append(f"KV heads of {config.local_heads.head_dim} there and {config.head_dim} elsewhere")
    if config.num_kv_shared_layers:
        found.append(f"{config.num_kv_shared_layers} layers read earlier layers' keys")
    if config.rope is None:
        found.append("learned positions")
    elif config.rope.kind != "default":
        found.append(f"{config.rope.kind} RoPE")
    if config.rope is not None and config.rope.dim != config.head_dim:
        found.append(f"{config.rope.dim} of {config.head_dim} dimensions rotated")
    if config.recurrent is not None:
        found.append(f"{config.recurrent.kind} in {len(config.recurrent.layers)} of {config.num_layers} layers")
    if config.experts is not None:
        sparse = len(config.experts.layers)
        found.append(f"{config.experts.per_token} of {config.experts.count} experts in {sparse} layers")
        if config.experts.router != "softmax":
            found.append(f"{config.experts.router.replace('_', ' ')} router")
    if config.norm_places != "before":
        found.append(f"norms {config.norm_places}")
    if config.unrotated_layers:
        found.append(f"no positions in {len(config.unrotated_layers)} layers")
    flags = {
        "local RoPE": config.local_rope is not None,
        "q/k norms": config.qk_norm == "head",
        "norms of all heads' q/k": config.qk_norm == "all_heads",
        "values normed": config.value_norm,
        "values made as keys are": config.values_are_keys,
        "embeddings of the layers' own": config.own_embedding is not None,
        "attention sinks": config.attention_sinks,
        "attention in chunks": config.chunk_tokens is not None,
        "q/k norms without weights": config.qk_norm == "unweighted",
        "growing queries": config.temperature is not None,
        "shared expert": config.experts is not None and config.experts.shared is not None,
        "scaled residuals": config.residual_scale != 1,
        "scaled logits": config.logits_scale != 1,
        "head bias": config.head_bias,
        "q/k/v biases": config.qkv_bias,
        "output bias": config.out_bias,
        "MLP biases": config.mlp_bias,
        "plain MLP": not config.gated_mlp,
        "score cap": config.attention_softcap is not None,
        "logit cap": config.logits_softcap is not None,
        "two parallel norms": config.num_parallel_norms == 2,
        "tied": config.tie_word_embeddings,
    }
    return ", ".join(found + [name for name, here in flags.items() if here])


def main() -> None:
    of_architecture: dict[str, list[str]] = {architecture: [] for architecture in FAMILIES}
    rows = []
    for name in names():
        golden = Golden(name)
        model = golden.load()
        kind = "GGUF: " if golden.checkpoint.suffix == ".gguf" else ""
        of_architecture[model.config.architecture].append(name)
        compared = [golden.compare(model, sizes) for sizes in golden.chunkings().values()]
        cells = [name, kind + features(model.config), f"{np.abs(golden.logits).max():.1f}"]
        cells += [f"{error:.1e}" for error, _ in compared]
        rows.append(f"| {' | '.join(cells)} | {'yes' if all(same for _, same in compared) else '**no**'} |")
        print(rows[-1], flush=True)
    families = []
    for architecture, family in FAMILIES.items():
        gguf = ", ".join(theirs for theirs, ours in ARCHITECTURES.items() if ours == architecture)
        cases = ", ".join(of_architecture[SAME_AS.get(architecture, architecture)])
        families.append(f"| {family.models} | {architecture} | {gguf} | {cases} |")
    DOCUMENT.write_text(HEAD + "\n".join(families) + "\n" + CASES + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
