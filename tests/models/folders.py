"""Small model folders, made from bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.models import WordLevel

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 96,
}  # fmt: skip


def write_json(folder: Path, **files: Any) -> Path:
    """Each as ``name``.json."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def word_folder(folder: Path, num_words: int = 96, **files: Any) -> Path:
    """A tokenizer of the words w0, w1 and so on, a config.json, and ``files``."""
    words = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(num_words)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    return write_json(folder, **{"config": CONFIG, **files})
