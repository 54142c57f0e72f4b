"""A model that costs next to nothing, to measure and to try what is around models."""

from __future__ import annotations

import json
from pathlib import Path

from jaxserve.config import EngineConfig
from jaxserve.tokenizer import Tokenizer

MAX_MODEL_LEN = 1024
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": MAX_MODEL_LEN, "tie_word_embeddings": True,
    "eos_token_id": 0,
}  # fmt: skip
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def write_tiny_model(folder: Path) -> None:
    """A Llama of two layers, whose tokens are bytes; ``folder`` exists."""
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    Tokenizer.of_bytes().save(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def tiny_config(folder: Path, max_num_seqs: int) -> EngineConfig:
    """An engine with the model in ``folder``, whose weights are random, and the same every time."""
    return EngineConfig(
        model=str(folder), load_format="dummy", max_model_len=MAX_MODEL_LEN, max_num_seqs=max_num_seqs,
        token_budget=2 * max_num_seqs,
    )  # fmt: skip
