"""The models whose steps are measured: one that matters, and one that a CPU runs in no time."""

from __future__ import annotations

import json
from pathlib import Path

from jaxserve.config import EngineConfig

TINY_SHAPE = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "sliding_window": 64, "eos_token_id": 2,
}  # fmt: skip
MODEL = "mistral-7b"
STEPS = EngineConfig(
    model=MODEL, load_format="dummy", token_budget=2048, max_num_seqs=128, max_model_len=8192,
    enable_prefix_caching=False,
)  # fmt: skip
SERVER = EngineConfig(
    model=MODEL, load_format="dummy", gemm_backend="cublaslt", token_budget=512, max_num_seqs=16, max_model_len=2048,
    enable_prefix_caching=False,
)  # fmt: skip
"""Products of cuBLASLt are tuned in seconds: XLA's default tries hundreds of Triton kernels too. The budget of
prefill_first is max_model_len, so short that both policies start in seconds."""


def write_tiny(folder: Path) -> str:
    """A folder for load_format dummy."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_SHAPE))
    return str(folder)
